"""Samples answers with vLLM and gives their tokens' log-probs by vLLM, Megatron-Core and transformers, in float32."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_nft import batching, policy, rollout
from megatron_nft.config import Config
from megatron_nft.policy import exchange
from megatron_nft.rollout import tools
from megatron_nft.trajectories import Group, Prompt, Response, Verdict


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    config = Config(run_dir="unused")
    config.train.tokens_per_micro_batch = given["window"] * 2
    config.rollout.cpu_kvcache_space = 1
    topology = policy.initialize(config.parallel, config.seed)
    found = {name: one_model(case, given["window"], topology, config) for name, case in given["cases"].items()}
    Path(given["output"]).write_text(json.dumps(found))
    policy.shutdown()


def one_model(case: dict, window: int, topology: policy.Topology, config: Config) -> list[dict[str, list[float]]]:
    """Each answer's log-probs by program."""
    config.model.path = case["model"]
    model = policy.Policy(config, topology, trainable=False)
    engine = rollout.Engine(config.model.path, config.rollout, window, "fp32", config.seed)
    engine.sync(model.hand_over(), version=1)
    prompts = [Prompt(str(i), "", "", tuple(ids), "test") for i, ids in enumerate(case["prompts"])]
    requests = [rollout.Request(p.token_ids, 1.0, 1.0, case["max_tokens"], seed) for seed, p in enumerate(prompts)]
    responses = engine.generate(requests) if "function" not in case else with_tools(case, engine, prompts, requests)
    engine.close()
    for response in responses:
        response.verdict = Verdict(1.0, "right")
    groups = [Group(p, [r], position=i) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    by_megatron = megatron_logprobs(model, groups, topology, config)
    hf = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, experts_implementation="eager")
    return [
        {
            "vllm": trained(group.responses[0].logprobs, group),
            "megatron": by_megatron[number],
            "huggingface": trained(hf_logprobs(hf, group), group),
            "text": group.responses[0].text,
            "masked": [t for t, counts in zip(group.responses[0].token_ids, group.responses[0].mask()) if not counts],
        }
        for number, group in enumerate(groups)
    ]


def with_tools(case: dict, engine: rollout.Engine, prompts: list[Prompt], requests: list[rollout.Request]) -> list[Response]:
    """All answers together, call after call."""
    function, tokenizer = tools.resolve(case["function"]), AutoTokenizer.from_pretrained(case["model"])
    responses, errors = tools.generate(engine, function, tokenizer, prompts, requests)
    assert errors == []
    return responses


def trained(values: list[float], group: Group) -> list[float]:
    """Those of the tokens that count."""
    return [value for value, counts in zip(values, group.responses[0].mask(), strict=True) if counts]


def megatron_logprobs(model: policy.Policy, groups: list[Group], topology: policy.Topology, config: Config) -> dict[int, list[float]]:
    """By number of the group, through the packed micro-batches of training."""
    answers, numbers = exchange.table(groups)
    layout = batching.Layout(1, config.train.tokens_per_micro_batch, len(groups))
    [batches] = model.receive(groups, numbers, batching.plan(answers, layout, lambda verdicts, _: verdicts, "constant", 1.0))
    model.fill_old_logprobs(batches, config.objective)
    found = {}
    for batch in batches:
        for i, number in enumerate(batch.answers):
            mine = (batch.answer_index == i) & (batch.loss_mask == 1)
            found[number] = batch.old_logprobs[mine].tolist()
    return found


@torch.no_grad()
def hf_logprobs(hf, group: Group) -> list[float]:
    prompt, answer = list(group.prompt.token_ids), group.responses[0].token_ids
    logits = hf(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


if __name__ == "__main__":
    main()

"""Trainer and vLLM in one process: what a run does between its steps, with looks at weights, log-probs and memory in between."""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from megatron_nft import objectives, policy, rollout
from megatron_nft.checksums import differing
from megatron_nft.config import Config, load, max_model_len
from megatron_nft.trajectories import Group, Prompt, Verdict
from tests.support import micro_batches_of

PROMPTS, ANSWERS = 8, 4
TOKENS = 48  # of an answer


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    config = load(arguments["config"], arguments["overrides"])
    policy.check(config, max_model_len(config))
    rollout.check(config, policy.world_size())
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology)
    model.offload()
    precision = policy.precision_of(config.model.precision)
    engine = rollout.Engine(config.model.path, config.rollout, max_model_len(config), precision, config.seed, weights_follow=True)
    engine.sync(model.hand_over(), version=0)
    model.offload()
    found = {"kernels": policy.kernels(config), "graphs": graphs(engine), "weights": {}, "parity": {}}
    look(found, "first sync", model, engine)
    found["sleep"] = asleep_and_awake(engine)
    step(model, engine, config, 1)
    look(found, "sync after an update", model, engine)
    found["rounds"] = [step(model, engine, config, 2 + number) for number in range(arguments["rounds"])]
    look(found, "last round", model, engine)
    torch.save(found, arguments["output"])
    engine.close()
    policy.shutdown()


def look(found: dict, when: str, model: policy.Policy, engine: rollout.Engine) -> None:
    """Note which of the sampler's tensors are not the trainer's, and how far the log-probs of new answers are apart."""
    wrong, compared = differing(policy.checksums(model), engine.checksums())
    if compared != engine.names:  # packed or quantised
        wrong += engine.differing(model.weights())
    found["weights"][when] = wrong
    found["parity"][when] = parity(model, engine)
    model.offload()


def parity(model: policy.Policy, engine: rollout.Engine) -> dict[str, float]:
    """|log pi_trainer - log pi_sampler| of sampled tokens, and the same of the sampler's own log-probs and those it finds reading them."""
    asked = requests(temperature=1.0)
    answers = engine.generate(asked)
    sequences = [[*request.token_ids, *answer.token_ids] for request, answer in zip(asked, answers)]
    own = torch.tensor([value for answer in answers for value in answer.logprobs])

    def apart(scores: list[list[float]]) -> torch.Tensor:
        of_answers = [score[len(request.token_ids) - 1 :] for request, score in zip(asked, scores)]
        return (torch.tensor([value for score in of_answers for value in score]) - own).abs()

    trainer, again = apart(policy.token_logprobs(model, sequences)), apart(engine.token_logprobs(sequences))
    return {"mean": trainer.mean().item(), "max": trainer.max().item(), "tokens": len(own), "rescored": again.max().item()}


def requests(temperature: float, count: int = 1) -> list[rollout.Request]:
    """`count` for each prompt, one prompt's behind the other's."""
    return [
        rollout.Request(prompt(number).token_ids, temperature, 1.0, TOKENS, seed=100 * number + k)
        for number in range(PROMPTS)
        for k in range(count)
    ]


def prompt(number: int) -> Prompt:
    g = torch.Generator().manual_seed(number)
    return Prompt(str(number), "", "", tuple(torch.randint(4, 304, (5 + 3 * number,), generator=g).tolist()), "made up")


def asleep_and_awake(engine: rollout.Engine) -> dict:
    """Level 1: weights and greedy answers before and after."""
    before, sums = engine.generate(requests(temperature=0.0)), engine.checksums()
    engine.sleep(level=1)
    engine.wake()
    after = engine.generate(requests(temperature=0.0))
    apart = max(abs(a - b) for one, other in zip(before, after) for a, b in zip(one.logprobs, other.logprobs))
    return {"weights": engine.checksums() == sums, "tokens": [a.token_ids for a in before] == [a.token_ids for a in after], "apart": apart}


def step(model: policy.Policy, engine: rollout.Engine, config: Config, version: int) -> dict[str, dict[str, int]]:
    """Sample, sleep, train, sync, as a run does; memory while the sampler works, when it sleeps, and at the end."""
    answers = engine.generate(requests(1.0, ANSWERS))
    gradients = sum(storage.nbytes() for storage in model._offload._storages("gradients"))
    at = {"awake": memory()}
    for number, answer in enumerate(answers):
        answer.verdict = Verdict(float(number % 2), "made up")
    groups = [Group(prompt(n), answers[n * ANSWERS : (n + 1) * ANSWERS], position=n) for n in range(PROMPTS)]
    engine.sleep()
    at["asleep"] = memory()
    _, mini_batches = micro_batches_of(model, groups)
    model.fill_old_logprobs([batch for mini in mini_batches for batch in mini], config.objective)
    for mini in mini_batches:
        model.update(mini, partial(objectives.loss, settings=config.objective), objectives.METRICS)
    del mini_batches
    engine.sync(model.hand_over(), version)
    model.offload()
    return at | {"rested": memory(), "gradients": gradients}


def memory() -> dict[str, int]:
    """Bytes: of torch's tensors, and of the device in use by all. Zeros without a GPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return {"allocated": 0, "used": 0}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.memory_allocated(), "used": total - free}


def graphs(engine: rollout.Engine) -> dict:
    """The engine's mode, how many CUDA graphs it captured at its start, and how many it replayed for some answers."""
    from vllm.compilation.counter import compilation_counter

    with replays() as counted:
        engine.generate(requests(temperature=1.0))
    compilation = engine._engine.vllm_config.compilation_config
    captured = compilation_counter.num_cudagraph_captured
    return {"mode": compilation.cudagraph_mode.name, "captured": captured, "replayed": len(counted)}


@contextmanager
def replays() -> Iterator[list]:
    """Notes every CUDA graph that is replayed inside."""
    replay, counted = torch.cuda.CUDAGraph.replay, []

    def noted(graph) -> None:
        counted.append(1)
        replay(graph)

    torch.cuda.CUDAGraph.replay = noted
    try:
        yield counted
    finally:
        torch.cuda.CUDAGraph.replay = replay


if __name__ == "__main__":
    main()

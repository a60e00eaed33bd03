"""The supervised warm start: packed sequences, loss on answer tokens only, same policy, same checkpoints as `train`."""

import random
from dataclasses import asdict
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from megatron_nft import batching, fitting, objectives, policy, prompts, saves, watchdog
from megatron_nft.balance import Balance
from megatron_nft.config import Config, save
from megatron_nft.errors import UserError
from megatron_nft.logbook import Logbook, held
from megatron_nft.policy import checkpoint
from megatron_nft.stopping import Stopped, StopRequest


def sft(config: Config, stop: StopRequest) -> None:
    """Train config.model.path on config.sft.data, mean negative log-likelihood of the answer tokens, and export the result.

    Raises Stopped, with the state saved, where `stop` asks for it before the last update.
    """
    if config.checkpoint.keep_best:
        raise UserError(f"checkpoint.keep_best is {config.checkpoint.keep_best}, and sft makes no validation", "use 0")
    resume_from = checkpoint.find(config, "sft")
    policy.check(config, window=1)
    fitting.check_trainer(config, sampling=False)
    examples = load_examples(config)
    with held(config.run_dir), policy.memory_told(config.run_dir):
        _train(config, stop, resume_from, examples)


def _train(config: Config, stop: StopRequest, resume_from: Path | None, examples: list[batching.TrainingAnswer]) -> None:
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology)
    model.temperature = 1.0
    state = {"command": "sft", "step": 0, "examples": fingerprint(examples)}
    if resume_from:
        _, saved = model.load_newest(resume_from)
        if saved.get("examples", state["examples"]) != state["examples"]:
            raise UserError("the examples of sft.data changed since the checkpoint", "restore them, or start a new run_dir")
        state["step"] = saved["step"]
    first_step = state["step"]
    run_dir = Path(config.run_dir)
    if topology.is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        save(config, run_dir / "config.yaml")
    log = Logbook(run_dir, "sft", config.sft.steps, first_step, config.logging, asdict(config), enabled=topology.is_first,
                  meter=policy.PeakMemory(), balance=Balance(policy.gathered, policy.hosts()),
                  around=partial(policy.memory_told, run_dir))  # fmt: skip
    kept = saves.Saves(model, config, log, topology.is_first)
    log.note(f"{len(examples)} examples; {policy.kernels(config)}")
    if first_step:
        log.note(f"resumed after step {first_step}")
    stop.begin()
    watchdog.reach("step")
    for step in range(first_step + 1, config.sft.steps + 1):
        with log.stage("batching"):
            chosen = [examples[i] for i in draw(len(examples), config.sft.sequences_per_update, step, config.seed)]
            [batches] = model.pack(plan(chosen, model.layout(len(chosen))), dict(enumerate(chosen)))
        with log.stage("train"):
            totals = model.update(batches, objectives.likelihood, ["terms_count", "nll_sum"])
        log.own("train", model.own_seconds)
        log.add(
            {f"train/{name}": totals[name] for name in ("loss", "grad_norm", "lr", "loss_scale") if name in totals},
            tokens=totals["terms_count"],
        )
        kept.poll()
        log.commit(step)
        asked = stop.agreed()
        if asked or step == config.sft.steps or (config.checkpoint.interval and step % config.checkpoint.interval == 0):
            with log.stage("checkpoint"):
                kept.start(state | {"step": step})
        if asked and step < config.sft.steps:
            kept.end()
            log.close()
            policy.shutdown()
            raise Stopped(f"stopped on request after step {step}, saved; the same command goes on")
    watchdog.reach("end")
    kept.end()
    if config.checkpoint.export:
        model.export(run_dir / "huggingface")
        log.note(f"wrote {run_dir / 'huggingface'}")
    log.close()
    policy.shutdown()


def load_examples(config: Config) -> list[batching.TrainingAnswer]:
    """Prompts and worked answers as token ids; the answer ends in the tokenizer's end token. Too long ones are an error."""
    if not config.sft.data:
        raise UserError("sft.data is empty", "name at least one file with a question and a solution column")
    tokenizer = prompts.load_tokenizer(config.model.path)
    template = prompts.Template.load(tokenizer, config.data)
    examples = []
    for dataset in config.sft.data:
        for row in prompts.load_rows(dataset, strip=bool(config.data.instruction)):
            if not row.get("solution"):
                raise UserError(
                    f"row {row['id']} of {dataset.path} has no solution", f"fill column {dataset.solution!r} or set sft.data[].solution"
                )
            text = template.text(row["question"], row.get("turns", ()))
            prompt = tokenizer.encode(text, add_special_tokens=False)
            response = tokenizer.encode(row["solution"], add_special_tokens=False) + [tokenizer.eos_token_id]
            if len(prompt) + len(response) > config.train.tokens_per_micro_batch:
                raise UserError(
                    f"row {row['id']} of {dataset.path} is {len(prompt) + len(response)} tokens long, "
                    f"train.tokens_per_micro_batch is {config.train.tokens_per_micro_batch}",
                    "raise it, or remove the row",
                )
            examples.append(batching.TrainingAnswer(prompt, response, [0.0] * len(response), [1] * len(response), 1.0))
    return examples


def fingerprint(examples: list[batching.TrainingAnswer]) -> str:
    """A hash of all tokens in their order."""
    digest = sha256()
    for example in examples:
        digest.update(repr((example.prompt, example.response)).encode())
    return digest.hexdigest()[:16]


def draw(count: int, size: int, step: int, seed: int) -> list[int]:
    """Numbers of the examples of an update: consecutive pieces of a stream that is reshuffled every epoch."""
    positions = range((step - 1) * size, step * size)
    return [_order(count, position // count, seed)[position % count] for position in positions]


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def plan(chosen: list[batching.TrainingAnswer], layout: batching.Layout) -> batching.Plan:
    """One mini-batch of examples, each its own group, reduced to the mean over answer tokens."""
    prompt_lengths = np.array([len(e.prompt) for e in chosen])
    lengths = np.array([len(e.response) for e in chosen])
    answers = batching.Answers(prompt_lengths, lengths, lengths, np.ones(len(chosen)), np.zeros(len(chosen)), np.arange(len(chosen)))
    return batching.plan(answers, layout, weights=lambda verdicts, _: np.ones(len(verdicts)), reduction="token-mean", constant=1.0)

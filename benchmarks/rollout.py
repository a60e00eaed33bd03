"""Kept groups a second: one queue that stops when the batch is full, against "send three times as many, wait for all, filter".

    python benchmarks/rollout.py
    python benchmarks/rollout.py --quick    too short to be steady

Real vLLM on this machine's CPU. Lengths are log-normal (sigma 1) and cut at 8 times the median; 30 % of the prompts have mixed groups, the
others are always right or always wrong. All ways answer the same prompts from the same engine; training and weight updates take no
time here, so a rollout step follows a rollout step. On a CPU a scheduler step is the cheaper the fewer answers run, on a GPU, which
reads the weights whatever their number, hardly: so the ratio of kept groups a scheduler step is printed, too.

useful: answers of kept groups / answers begun. idle: share of the engine's places that no running answer took, over scheduler steps.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch.distributed as dist

from megatron_nft import policy
from megatron_nft.config import Config
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rollout import Engine, Request, Sampler
from megatron_nft.rollout.settings import sampling_params
from megatron_nft.trajectories import Prompt, Response, Verdict

PROMPT = 16  # tokens
MIXED_SHARE, SIGMA, CUT = 0.3, 1.0, 8
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic" / "model"


def chance(*parts: int | str) -> float:
    """A number in [0, 1) that follows from the parts."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") / 2**64


def length_of(prompt: int, sample: int, median: int) -> int:
    draw = statistics.NormalDist().inv_cdf(min(max(chance("length", prompt, sample), 1e-9), 1 - 1e-9))
    return max(1, min(round(median * float(np.exp(SIGMA * draw))), CUT * median))


def prompts(count: int) -> PromptSet:
    """The number of a prompt is in its tokens."""
    return PromptSet([Prompt(str(i), "", "", (*divmod(i, 50), *[7] * (PROMPT - 2)), "set") for i in range(count)])


class MadeUpJudge:
    """Three prompts in ten are answered right every second time, the others always or never."""

    def submit(self, text: str, prompt: Prompt) -> Future:
        kind = chance("kind", prompt.id)
        rate = 0.5 if kind < MIXED_SHARE else float(kind < (1 + MIXED_SHARE) / 2)
        right = chance("verdict", text, prompt.id) < rate
        future: Future = Future()
        future.set_result(Verdict(float(right), "right" if right else "wrong"))
        return future


class LengthEngine(Engine):
    """Answers are as long as length_of says, whatever the model samples; counts what it does."""

    def begin(self, n: int, median: int) -> None:
        self.n, self.median = n, median
        self.begun = self.ticks = self.used = self._now = 0
        self.seen: set[tuple] = set()

    def add(self, key: int, request: Request) -> None:
        so_far = len(request.token_ids) - PROMPT
        length = length_of(request.token_ids[0] * 50 + request.token_ids[1], key % self.n, self.median)
        params = sampling_params(replace(request, max_tokens=max(length - so_far, 1)))
        params.ignore_eos = True
        self._engine.add_request(str(key), {"type": "token", "prompt_token_ids": list(request.token_ids)}, params)
        self.begun += not so_far
        self._now += 1

    def step(self) -> list[tuple[int, Response]] | None:
        self.used, self.ticks = self.used + min(self._now, self.slots), self.ticks + bool(self._now)
        finished = super().step()
        self._now -= len(finished or ())
        return finished and [(key, replace(response, finish_reason="stop")) for key, response in finished]

    def withdraw(self, keys) -> dict[int, Response]:
        found = super().withdraw(keys)
        self._now -= len(found)
        return found


@dataclass
class Result:
    """What a way of sampling gave."""

    groups: int
    seconds: float
    useful: float
    idle: float
    length: float  # mean, of the kept groups' answers
    ticks: int  # scheduler steps

    @property
    def rate(self) -> float:
        return self.groups / self.seconds


def settings(arguments: argparse.Namespace, **rollout) -> Config:
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.rollout.max_tokens = arguments.groups, arguments.n, CUT * arguments.median
    config.rollout.max_num_seqs, config.train.prompts_per_update = arguments.slots, 1
    config.data.most_skipped = rollout.pop("most_skipped", 0.0)
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return config


def measured(engine: LengthEngine, steps: range, step) -> Result:
    """step(number) -> the lengths of the kept groups' answers, group by group."""
    engine.begin(engine.n, engine.median)
    kept, begin = [], time.perf_counter()
    for number in steps:
        kept += step(number)
        engine.weight_version = number
    seconds = time.perf_counter() - begin
    answers = [length for group in kept for length in group]
    return Result(
        len(kept),
        seconds,
        len(answers) / engine.begun,
        1 - engine.used / (engine.ticks * engine.slots),
        float(np.mean(answers)),
        engine.ticks,
    )


def plain(engine: LengthEngine, arguments: argparse.Namespace) -> Result:
    """Send 3 times the groups that are wanted, wait for all answers, keep the mixed groups, no more than wanted."""
    cursor, judge, n = Cursor(prompts(arguments.prompts), 1), MadeUpJudge(), arguments.n

    def step(number: int) -> list[list[int]]:
        drawn = cursor.take(3 * arguments.groups)
        responses = engine.generate(
            [Request(p.token_ids, 1.0, 1.0, 1, number * 10**6 + i * n + k) for i, p in enumerate(drawn) for k in range(n)]
        )
        kept = []
        for i, prompt in enumerate(drawn):
            own = responses[i * n : (i + 1) * n]
            if len({judge.submit(response.text, prompt).result().score for response in own}) > 1:
                kept.append([len(response.token_ids) for response in own])
        return kept[: arguments.groups]

    engine.begin(n, arguments.median)
    return measured(engine, range(1, arguments.steps + 1), step)


def queued(engine: LengthEngine, arguments: argparse.Namespace, warm_up: int = 1, **rollout) -> Result:
    """Our sampler. warm_up: steps before the clock starts, in which the queue learns the share of mixed groups."""
    config = settings(arguments, **rollout)
    cursor = Cursor(prompts(arguments.prompts), 1, most_skipped=config.data.most_skipped)
    engine.weight_version = 0
    engine.begin(config.rollout.n, arguments.median)
    sampler = Sampler(engine, MadeUpJudge(), cursor, config)

    def step(number: int) -> list[list[int]]:
        return [[len(response.token_ids) for response in group.responses] for group in sampler.groups(number).groups]

    for number in range(1, warm_up + 1):
        step(number)
        engine.weight_version = number
    return measured(engine, range(warm_up + 1, warm_up + 1 + arguments.steps), step)


def model(directory: Path, hidden: int, layers: int) -> Path:
    """A random Qwen2 with the demo's tokenizer, whose answers mean nothing."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                         num_attention_heads=hidden // 64, num_key_value_heads=2, max_position_embeddings=4096)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def row(name: str, result: Result, first: Result) -> str:
    """A line of the table; ratios to the first way: kept groups a second, and a scheduler step."""
    of_seconds, of_ticks = result.rate / first.rate, result.groups / result.ticks * first.ticks / first.groups
    return (
        f"{name:34} {result.groups:6} {result.seconds:8.1f} {result.rate:9.2f} {of_seconds:6.2f} {result.ticks:6} {of_ticks:6.2f} "
        f"{result.useful:7.1%} {result.idle:6.1%} {result.length:7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=8, help="kept groups a step")
    parser.add_argument("--n", type=int, default=8, help="answers a prompt")
    parser.add_argument("--median", type=int, default=24, help="length in tokens")
    parser.add_argument("--slots", type=int, default=64, help="answers that can run at once (max_num_seqs)")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20, help="rollout steps of each way")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.prompts = 2, 100
    with tempfile.TemporaryDirectory() as directory:
        path = model(Path(directory), arguments.hidden, arguments.layers)
        policy.start_distributed()
        config = settings(arguments)
        engine = LengthEngine(str(path), config.rollout, PROMPT + CUT * arguments.median + 1, "fp32", 1)
        engine.begin(arguments.n, arguments.median)
        epochs = 2 * arguments.prompts // (3 * arguments.groups)  # steps in which every prompt has come some two times
        fast = {"order": "started", "max_staleness": 2}
        ways = {
            "plain: 3x, wait for all, filter": lambda: plain(engine, arguments),
            "order: prompt (deterministic)": lambda: queued(engine, arguments),
            "order: started, max_staleness: 1": lambda: queued(engine, arguments, order="started", max_staleness=1),
            "order: started, max_staleness: 2": lambda: queued(engine, arguments, **fast),
            "order: finished, max_staleness: 1": lambda: queued(engine, arguments, order="finished", max_staleness=1),
            "started, 2, hopeless_after: 5": lambda: queued(engine, arguments, hopeless_after=5, **fast),
            "started, 2, most_skipped: 0.9": lambda: queued(engine, arguments, warm_up=epochs, most_skipped=0.9, **fast),
            "all three": lambda: queued(engine, arguments, warm_up=epochs, most_skipped=0.9, hopeless_after=5, **fast),
        }
        heads = zip(("groups", "seconds", "groups/s", "ratio", "steps", "ratio", "useful", "idle", "length"), (6, 8, 9, 6, 6, 6, 7, 6, 7))
        print(" " * 34, *(f"{head:>{width}}" for head, width in heads))
        results: dict[str, Result] = {}
        for name, way in ways.items():
            results[name] = way()
            print(row(name, results[name], next(iter(results.values()))), flush=True)
        print("steps: of the scheduler; length: tokens, mean of the kept groups' answers")
        print(json.dumps({name: vars(result) for name, result in results.items()}))
        engine.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Packing of a rollout step: how full the micro-batches are, how even the replicas, and how long it takes to plan.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/packing.py [--budget TOKENS] [--sigma S] [--attention-cost K]

8,192 answers of a 16k reasoning run (512 prompts x 16; log-normal lengths capped at 14,336, and a prompt), 16 mini-batches of 512
answers, over 8, 16 and 32 data-parallel replicas. Columns:
  fill          tokens / slots that the model computes, over the rollout step
  least         the same, of the worst mini-batch
  slowest/mean  a replica's cost is the sum of n + k n^2 over its answers: the slowest replica's by the mean, worst mini-batch
  work          time of the rollout step in units of what no padding and perfect balance would take: every slot costs 1, attention
                k n^2 for each answer (or padded row), a mini-batch lasts as long as its slowest replica
  planning      CPU time, best of five
Ways: `ours`; `fixed`, ours with every micro-batch as long as the budget; `by tokens`, answers longest first to the replica with the
fewest tokens, then best fit, micro-batches as long as the budget; `padded`, answers in order, as many rows to a micro-batch as the
budget holds, each row padded to the longest.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_nft.batching import Answers, Layout, plan

CAP, N = 14_336, 16


def reasoning_lengths(prompts: int, seed: int, median: float = 3500.0, sigma: float = 0.85) -> tuple[np.ndarray, np.ndarray]:
    """Made-up lengths (prompts', responses'), both int [prompts * 16], of a reasoning run with at most 14,336 tokens an answer."""
    rng = np.random.default_rng(seed)
    responses = np.exp(rng.normal(math.log(median), sigma, prompts * N))
    return np.repeat(rng.integers(100, 300, prompts), N), np.clip(responses.astype(np.int64), 1, CAP)


def answers_of(prompts: np.ndarray, responses: np.ndarray) -> Answers:
    """Groups of 16, every token trained on."""
    count = len(prompts)
    return Answers(prompts, responses, responses, np.arange(count) % 2.0, np.zeros(count), np.arange(count) // N)


@dataclass
class Placed:
    """A mini-batch: for each replica the lengths of its rows as they are computed, its answers' lengths, and its slots."""

    rows: list[np.ndarray]
    answers: list[np.ndarray]
    slots: list[int]


def planned(answers: Answers, layout: Layout) -> list[Placed]:
    """As the trainer packs."""
    found = plan(answers, layout, lambda verdicts, _: verdicts, "constant", 1.0)
    placed = []
    for mini in found.mini_batches:
        own = [answers.lengths[[a for batch in replica for a in batch]] for replica in mini.micro_batches]
        placed.append(Placed(own, own, [len(replica) * mini.slots for replica in mini.micro_batches]))
    return placed


def by_tokens(lengths: np.ndarray, layout: Layout) -> Placed:
    """Longest first to the replica with the fewest tokens; best fit within a replica."""
    loads, own = [0] * layout.data_parallel_size, [[] for _ in range(layout.data_parallel_size)]
    for length in sorted(lengths.tolist(), reverse=True):
        lightest = loads.index(min(loads))
        own[lightest].append(length)
        loads[lightest] += length
    most = max(len(_best_fit(replica, layout.tokens_per_micro_batch)) for replica in own)
    rows = [np.array(replica) for replica in own]
    return Placed(rows, rows, [most * layout.tokens_per_micro_batch] * len(own))


def _best_fit(lengths: list[int], budget: int) -> list[int]:
    rooms: list[int] = []
    for length in lengths:
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(budget - length)
    return rooms


def padded(lengths: np.ndarray, layout: Layout) -> Placed:
    """Equally many answers to every replica, in order; rows of a micro-batch padded to its longest."""
    own, rows = np.array_split(lengths, layout.data_parallel_size), []
    for replica in own:
        widths, first = [], 0
        for end in range(1, len(replica) + 1):
            if end == len(replica) or (end + 1 - first) * replica[first : end + 1].max() > layout.tokens_per_micro_batch:
                widths += [replica[first:end].max()] * (end - first)
                first = end
        rows.append(np.array(widths))
    return Placed(rows, own, [int(r.sum()) for r in rows])


def each(way: Callable[[np.ndarray, Layout], Placed]) -> Callable[[Answers, Layout], list[Placed]]:
    """A way for one mini-batch, for all mini-batches of a rollout step."""
    return lambda answers, layout: [
        way(answers.lengths[start : start + layout.prompts_per_update * N], layout)
        for start in range(0, len(answers.lengths), layout.prompts_per_update * N)
    ]


def measure(placed: list[Placed], k: float) -> tuple[float, float, float, float]:
    """fill, least fill, slowest/mean, work."""
    fills, uneven, took, ideal = [], [], 0.0, 0.0
    for mini in placed:
        costs = np.array([(n + k * n * n).sum() for n in mini.answers])
        works = [slots + k * (n * n).sum() for n, slots in zip(mini.rows, mini.slots)]
        fills.append(sum(int(n.sum()) for n in mini.answers) / sum(mini.slots))
        uneven.append(costs.max() / costs.mean())
        took, ideal = took + max(works), ideal + costs.mean()
    tokens = sum(int(n.sum()) for mini in placed for n in mini.answers)
    return tokens / sum(sum(mini.slots) for mini in placed), min(fills), max(uneven), took / ideal


def timed(way: Callable[[], list[Placed]]) -> tuple[list[Placed], float]:
    """What comes out, and the least of five times, in ms."""
    seconds = []
    for _ in range(5):
        started = time.process_time()
        found = way()
        seconds.append(time.process_time() - started)
    return found, 1e3 * min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--sigma", type=float, default=0.85)
    parser.add_argument("--attention-cost", type=float, default=1.5e-5, help="that of Qwen2.5-7B; 32B 1.0e-5, 1.5B 2.8e-5")
    options = parser.parse_args()
    answers = answers_of(*reasoning_lengths(512, seed=1, sigma=options.sigma))
    print(f"{len(answers.lengths)} answers, {answers.lengths.mean():.0f} tokens on average, longest {answers.lengths.max()}")
    print(f"{'budget':>7}{'DP':>4}  {'way':<10}{'fill':>7}{'least':>7}{'slowest/mean':>14}{'work':>7}{'by ours':>9}{'planning':>11}")
    for budget in options.budget:
        for replicas in (8, 16, 32):
            compare(answers, budget, replicas, options.attention_cost)


def compare(answers: Answers, budget: int, replicas: int, k: float) -> None:
    """One line for each way."""
    fixed = Layout(replicas, budget, 32, k)
    ours, least_work = Layout(replicas, budget, 32, k, length_multiple=128), None
    ways = {"ours": (planned, ours), "fixed": (planned, fixed), "by tokens": (each(by_tokens), fixed), "padded": (each(padded), fixed)}
    for name, (way, layout) in ways.items():
        placed, took = timed(lambda way=way, layout=layout: way(answers, layout))
        fill, least, uneven, work = measure(placed, k)
        least_work = least_work or work
        ratio = work / least_work
        print(f"{budget:>7}{replicas:>4}  {name:<10}{fill:>7.1%}{least:>7.1%}{uneven:>14.3f}{work:>7.3f}{ratio:>8.2f}x{took:>8.1f} ms")


if __name__ == "__main__":
    main()

"""Engines without vLLM: several of them in threads, in lockstep, with answers that follow from the request alone."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron_nft.rollout import Request
from megatron_nft.trajectories import Prompt, Response

WRONG, RIGHT, MIXED, CHANCE = range(4)  # a fake prompt's first token says how it is answered
LENGTHS = {WRONG: 5, RIGHT: 2, MIXED: 3, CHANCE: 4}  # of its answers, in tokens, one for each scheduler step
LONGEST = 5  # answers as long as this end by length


def fake_prompt(kind: int, number: int = 0) -> Prompt:
    return Prompt(f"set/{number}", "1?", "1", (kind, 10 + number), "set")


@dataclass
class Lockstep:
    """What `ranks` threads share: a barrier and a board for values. A rank that is missing breaks it instead of hanging."""

    ranks: int
    board: list = field(default_factory=list)

    def __post_init__(self):
        self.board = [None] * self.ranks
        self.barrier = threading.Barrier(self.ranks, timeout=20)


class FakeEngine:
    """The interface of rollout.Engine. Every second answer to a MIXED prompt is right; CHANCE goes by the seed.

    length(prompt, sample) says how long an answer is, unless it goes by the kind of its prompt.
    """

    def __init__(self, n: int, rank: int = 0, tp: int = 1, lockstep: Lockstep | None = None, slots: int = 1000,
                 length: Callable[[int, int], int] | None = None):  # fmt: skip
        self._lockstep = lockstep or Lockstep(1)
        self._n, self._rank, self._tp = n, rank, tp
        self.count, self.index, self.is_first = self._lockstep.ranks // tp, rank // tp, rank % tp == 0
        self.slots, self.waiting, self.stop_at = slots, 0, None
        self.weight_version, self.requests, self.weights, self.slept, self.most = 0, [], {}, 0, 0
        self.running: dict[int, tuple[Request, int]] = {}  # by key, with the number of tokens so far
        self._length = length or (lambda prompt, sample: LENGTHS[prompt[0]])
        self.steps = 0
        self.throughput = SimpleNamespace(begin=lambda: None, take=lambda: {"tokens_per_second": 1.0, "busy_seconds": 0.5})

    def generate(self, requests: list[Request], on_finish: Callable[[int, Response], None]) -> list[Response]:
        responses = [None] * len(requests)
        for index, request in enumerate(requests):
            self.add(index, request)
        while (finished := self.step()) is not None:
            for index, response in finished:
                responses[index] = response
                on_finish(index, response)
        return responses

    def add(self, key: int, request: Request) -> None:
        self.requests.append(request)
        self.running[key] = request, 0
        self.most = max(self.most, len(self.running))

    def step(self) -> list[tuple[int, Response]] | None:
        if not any(self._everyones(len(self.running))):
            return None
        self.steps += 1
        self.running = {key: (request, tokens + 1) for key, (request, tokens) in self.running.items()}
        done = [key for key, (request, tokens) in self.running.items() if len(request.token_ids) - 2 + tokens >= self._of(key)]
        return [(key, self._respond(key, *self.running.pop(key))) for key in reversed(done)]  # not in the order of asking

    def withdraw(self, keys: Iterable[int]) -> dict[int, Response]:
        found = {key: self.running.pop(key) for key in list(keys) if key in self.running}
        return {key: Response(self._tokens(*of), [-0.5] * of[1], "unfinished", self.weight_version, "") for key, of in found.items()}

    def asked_to_stop(self) -> bool:
        return self.stop_at is not None and self.steps >= self.stop_at

    def decode(self, token_ids: list[int]) -> str:
        return "\\boxed{1}" if token_ids[-1] == 1 else "\\boxed{2}"

    def added(self, values):
        return sum(self._everyones(values.clone()))

    def gather(self, value: Any) -> list[Any]:
        return self._everyones(value)[:: self._tp]

    def _everyones(self, value: Any) -> list[Any]:
        self._lockstep.board[self._rank] = value
        self._lockstep.barrier.wait()
        values = list(self._lockstep.board)
        self._lockstep.barrier.wait()  # nobody writes the next value before all have read this one
        return values

    def sync(self, buckets, version: int) -> None:
        self.weights, self.weight_version = {name: tensor for bucket in buckets for name, tensor in bucket.tensors()}, version

    def sleep(self) -> None:
        self.slept += 1

    def _of(self, key: int) -> int:
        request, _ = self.running[key]
        return self._length(request.token_ids[:2], key % self._n)

    def _tokens(self, request: Request, count: int) -> list[int]:
        return [2 + request.seed % (10 + i) for i in range(count)]

    def _respond(self, key: int, request: Request, count: int) -> Response:
        kind, sample = request.token_ids[0], key % self._n
        right = {WRONG: False, RIGHT: True, MIXED: sample % 2 == 0, CHANCE: request.seed % 2 == 0}[kind]
        tokens = [*self._tokens(request, count)[:-1], int(right)]
        reason = "length" if count == LONGEST else "stop"
        return Response(tokens, [-0.5] * len(tokens), reason, self.weight_version, self.decode(tokens))


def on_ranks(ranks: int, n: int, run: Callable[[FakeEngine], Any], tp: int = 1, **settings) -> list[Any]:
    """What run(engine) returns on each of `ranks` ranks, all running at once."""
    lockstep = Lockstep(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, FakeEngine(n, rank, tp, lockstep, **settings)) for rank in range(ranks)]
        return [future.result() for future in futures]

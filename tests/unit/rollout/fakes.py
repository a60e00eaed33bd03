"""Engines without vLLM: several of them in threads, in lockstep, with answers that follow from the request alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from megatron_nft.rollout import Request
from megatron_nft.trajectories import Prompt, Response

WRONG, RIGHT, MIXED, CHANCE = range(4)  # a fake prompt's first token says how it is answered
LENGTHS = {WRONG: 5, RIGHT: 2, MIXED: 3, CHANCE: 4}  # of its answers, in tokens
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
    """The interface of rollout.Engine. Every second answer to a MIXED prompt is right; CHANCE goes by the seed."""

    def __init__(self, n: int, rank: int = 0, tp: int = 1, lockstep: Lockstep | None = None):
        self._lockstep = lockstep or Lockstep(1)
        self._n, self._rank, self._tp = n, rank, tp
        self.count, self.index, self.is_first = self._lockstep.ranks // tp, rank // tp, rank % tp == 0
        self.weight_version, self.requests, self.weights, self.slept = 0, [], {}, 0

    def generate(self, requests: list[Request], on_finish: Callable[[int, Response], None]) -> list[Response]:
        self._lockstep.barrier.wait()  # a collective call
        self.requests += requests
        responses = [self._respond(request, i % self._n) for i, request in enumerate(requests)]
        for index in reversed(range(len(requests))):  # answers do not finish in the order in which they were asked for
            on_finish(index, responses[index])
        return responses

    def gather(self, value: Any) -> list[Any]:
        self._lockstep.board[self._rank] = value
        self._lockstep.barrier.wait()
        values = list(self._lockstep.board)
        self._lockstep.barrier.wait()  # nobody writes the next value before all have read this one
        return values[:: self._tp]

    def sync(self, buckets, version: int) -> None:
        self.weights, self.weight_version = {name: tensor for bucket in buckets for name, tensor in bucket.tensors()}, version

    def sleep(self) -> None:
        self.slept += 1

    def _respond(self, request: Request, sample: int) -> Response:
        kind = request.token_ids[0]
        right = {WRONG: False, RIGHT: True, MIXED: sample % 2 == 0, CHANCE: request.seed % 2 == 0}[kind]
        tokens = [request.seed % (10 + i) for i in range(LENGTHS[kind])]
        reason = "length" if len(tokens) == LONGEST else "stop"
        return Response(tokens, [-0.5] * len(tokens), reason, self.weight_version, "\\boxed{1}" if right else "\\boxed{2}")


def on_ranks(ranks: int, n: int, run: Callable[[FakeEngine], Any], tp: int = 1) -> list[Any]:
    """What run(engine) returns on each of `ranks` ranks, all running at once."""
    lockstep = Lockstep(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, FakeEngine(n, rank, tp, lockstep)) for rank in range(ranks)]
        return [future.result() for future in futures]

"""Verdicts are asked for the moment an answer is finished, while others still run."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from megatron_nft.errors import UserError
from megatron_nft.rollout import tools
from megatron_nft.rollout.engine import Engine
from megatron_nft.rollout.settings import Request
from megatron_nft.trajectories import Group, Prompt, Response

if TYPE_CHECKING:
    from megatron_nft.rewards.judge import Judge

LAG = 16  # scheduler steps, with `steady`


class Verdicts:
    """Answers that wait for their verdicts, in the order in which they were finished.

    steady: a verdict counts from a fixed number of scheduler steps after it was asked for, however long it really took, so that what is
    sent and when does not depend on the speed of the judge. `seconds`: waited for verdicts so far.
    """

    def __init__(self, judge: "Judge", steady: bool):
        self._judge, self._lag = judge, LAG if steady else None
        self._pending: list[tuple[int, int, int, Response, Future]] = []
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._pending)

    def ask(self, tick: int, key: int, sample: int, prompt: Prompt, response: Response) -> None:
        """tick: the scheduler step."""
        self._pending.append((tick, key, sample, response, self._judge.submit(response.text, prompt)))

    def ready(self, tick: int, at_most: int, idle: bool) -> list[tuple[int, int, Response]]:
        """(key, sample, response with its verdict) of no more than so many. idle: there is nothing to do but to wait, for one at least."""
        if self._lag is None:
            chosen = [entry for entry in self._pending if entry[4].done()] or (self._pending[:1] if idle else [])
        else:
            chosen = self._pending if idle else [entry for entry in self._pending if entry[0] <= tick - self._lag]
        chosen = chosen[:at_most]
        taken = {id(entry) for entry in chosen}
        self._pending = [entry for entry in self._pending if id(entry) not in taken]
        return [(key, sample, self._judged(response, verdict)) for _, key, sample, response, verdict in chosen]

    def rest(self) -> list[tuple[int, int, Response]]:
        """All that is left, waited for."""
        found = []
        while self._pending:
            found += self.ready(0, len(self._pending), idle=True)
        return found

    def forget(self) -> None:
        """Nobody wants those that are left."""
        self._pending.clear()

    def _judged(self, response: Response, verdict: Future) -> Response:
        begin = time.perf_counter()
        response.verdict = verdict.result()
        self.seconds += time.perf_counter() - begin
        return response


class _Filling:
    """Groups whose answers come one by one; on_group is told of each when all of its answers are there and judged."""

    def __init__(self, prompts: list[Prompt], requests: list[list[Request]], on_group: Callable[[int, Group], None] | None):
        self.groups = [Group(prompt, [None] * len(own)) for prompt, own in zip(prompts, requests, strict=True)]
        self._places = [(i, sample) for i, own in enumerate(requests) for sample in range(len(own))]
        self._verdicts: list[list[tuple[Response, Future]]] = [[] for _ in prompts]
        self._full: list[int] = []  # all answers are there, verdicts may be missing
        self._on_group = on_group

    def prompt(self, index: int) -> Prompt:
        """Of a request, by its number among all."""
        return self.groups[self._places[index][0]].prompt

    def put(self, index: int, response: Response, verdict: Future) -> None:
        """The answer to a request."""
        i, sample = self._places[index]
        self.groups[i].responses[sample] = response
        self._verdicts[i].append((response, verdict))
        if len(self._verdicts[i]) == len(self.groups[i].responses):
            self._full.append(i)
        self.hand_on(wait=False)

    def hand_on(self, wait: bool) -> None:
        """Tell of the groups that are complete; wait: for verdicts, too. Raises the first UserError of a verdict, after all the others."""
        errors = []
        for i in [i for i in self._full if wait or all(verdict.done() for _, verdict in self._verdicts[i])]:
            self._full.remove(i)  # one by one: what is not told of yet is still there if this one raises
            judged, self._verdicts[i] = self._verdicts[i], []
            try:
                for response, verdict in judged:
                    response.verdict = verdict.result()
            except UserError as error:
                errors.append(error)
                continue
            if self._on_group is not None:
                self._on_group(i, self.groups[i])
        if errors:
            raise errors[0]

    def end(self, before_waiting: Callable[[], None] | None) -> None:
        """Tell of the groups whose verdicts are there, and then of the others, as their verdicts come."""
        try:
            self.hand_on(wait=False)
            if before_waiting is not None:
                before_waiting()
        finally:
            self.hand_on(wait=True)


def answer(
    engine: Engine,
    judge: "Judge | None",
    prompts: list[Prompt],
    requests: list[list[Request]],
    on_finish: Callable[[int, Response], None] | None = None,
    function: str | None = None,
    on_group: Callable[[int, Group], None] | None = None,
    before_waiting: Callable[[], None] | None = None,
) -> list[Group]:
    """Sample and judge this engine's prompts; requests[i] are those of prompts[i]. Called by every rank, with or without prompts.

    Verdicts start as answers finish; on_finish(index, response) is called then, too. on_group(i, group) is called when all answers to
    prompts[i] are judged, while others still run; of those that are complete it is called also where this ends by an exception.
    before_waiting() is called when nothing runs any more, and verdicts may still be waited for.
    function: as rollout.function. Returns the groups ([] on a rank that is not its engine's first, which has no judge to ask).
    """
    filling = _Filling(prompts, requests, on_group)

    def submit(index: int, response: Response) -> None:
        if engine.is_first:
            filling.put(index, response, judge.submit(response.text, filling.prompt(index)))
        if on_finish is not None:
            on_finish(index, response)

    flat = [request for own in requests for request in own]
    try:
        if function is None:
            engine.generate(flat, submit)
        else:
            asked = [filling.prompt(index) for index in range(len(flat))]
            tools.generate(engine, tools.resolve(function), engine.tokenizer, asked, flat, submit)
    finally:
        filling.end(before_waiting)
    return filling.groups if engine.is_first else []

"""The colocated sampler. Each engine takes prompts from one queue as it has room, and all stop when enough groups are there.

Every rank has the whole Queue and is told the same: after every few steps of the schedulers one sum over all ranks says which answers have
got what verdict, and how much room the engines have. So all of them send, give up and stop at the same step, without asking each other. The
answers themselves stay where they were sampled; elsewhere a stub stands for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_nft.config import Config
from megatron_nft.rollout import endings, throughput, tools
from megatron_nft.rollout.engine import ASK_EVERY, Engine
from megatron_nft.rollout.queue import Queue, Taken
from megatron_nft.rollout.record import read_carried, write_carried
from megatron_nft.rollout.settings import Request
from megatron_nft.rollout.summaries import statistics, summarise
from megatron_nft.rollout.verdicts import Verdicts
from megatron_nft.stopping import Stopped
from megatron_nft.trajectories import Group, Prompt, Response, Verdict
from megatron_nft.weights import Bucket

if TYPE_CHECKING:
    from megatron_nft.prompts import Cursor
    from megatron_nft.rewards.judge import Judge

# Scheduler steps between two sums over all ranks, where there are several engines. A sum over 128 ranks is 254 messages of gloo's ring, one
# after the other, and each waits for the slowest engine's step; answers of thousands of tokens leave room for these few steps.
TELL_EVERY = 8
EVENTS = 128  # verdicts that an engine can tell of at a time; more wait for the next one
_FREED, _WAITING, _PENDING, _COUNT, _FIRST = range(5)  # what an engine's row of numbers begins with
_EVENT = 4  # numbers: key, sample, score, whether it ended by length


@dataclass
class Rollout:
    """What one rollout step gave."""

    groups: list[Group]  # kept, this engine's, in the order of starting; empty on ranks that are not their engine's first
    statistics: dict[str, float]  # over all engines, the same on every rank
    reward_seconds: float  # waited for verdicts, the longest of the engines
    warnings: list[str] = field(default_factory=list)
    engines: dict[str, float] = field(default_factory=dict)  # rates, counts and seconds of the engines, the same on every rank
    own_seconds: float | None = None  # this rank's engine was at work, and not waiting for the others; None: it has none


class Sampler:
    """This rank's engine, the judge of the answers, and the queue, which a checkpoint holds.

    The judge may be None on ranks where `engine.is_first` is false.
    """

    def __init__(self, engine: Engine, judge: "Judge | None", cursor: "Cursor", config: Config):
        self._engine, self._cursor, self._rollout = engine, cursor, config.rollout
        self._queue = Queue(cursor, config)
        function = tools.resolve(config.rollout.function) if config.rollout.function else None
        self._talks = tools.Talks(function, engine.tokenizer if function else None)
        self._at_once: list[int] = []  # own answers in which the engine has nothing to write
        self._verdicts = Verdicts(judge, steady=config.rollout.order == "prompt")
        self._prompts = {}  # by key, of the groups that this engine answers
        self._running: set[int] = set()  # own answers, as the engine knows them
        self._freed = self._tokens = 0  # places, since the other ranks were told; tokens sampled in this step
        self._stride = TELL_EVERY if engine.count > 1 else 1
        self._busy = [0] * engine.count  # running answers of every engine
        self._waiting, self._pending = [0] * engine.count, [0] * engine.count

    def groups(self, step: int) -> Rollout:
        """Sample until rollout.prompts_per_step groups are mixed, or no more prompts may be sent; with dynamic_sampling false, so many
        prompts are sent and every group that has an answer is kept. A collective call. Raises Stopped where the run is asked to stop."""
        self._queue.begin(step, self._engine.weight_version)
        self._engine.throughput.begin()
        self._verdicts.seconds, self._tokens, skipped, ticks, used = 0.0, 0, self._cursor.skipped, 0, 0
        while True:
            if ticks // self._stride % ASK_EVERY == 0 and self._engine.asked_to_stop():
                self._give_up()
            self._send()
            if self._queue.enough or not (any(self._busy) or any(self._pending)) and self._queue.exhausted:
                break
            busy = sum(self._busy)
            self._advance(ticks)
            ticks, used = ticks + self._stride, used + self._stride * busy
        idle = 1 - used / (ticks * self._engine.count * self._engine.slots) if ticks else 0.0
        sent, enough = self._queue.started, self._queue.enough
        taken = self._queue.take()
        self._pause()
        rollout = self._rollout_of(taken, enough)
        rollout.statistics |= {"prompts_sent": sent, "prompts_skipped": self._cursor.skipped - skipped, "idle_share": idle}
        self._engine.sleep()  # on a GPU training needs the memory; sync wakes it
        return rollout

    def sync(self, buckets: Iterator[Bucket], version: int) -> bool:
        """New weights for the engine, as Engine.sync takes them; whether it has them."""
        self._engine.sync(buckets, version)
        return True

    def close(self) -> None:
        """Nothing: what there is to end is the engine's."""

    # ---- for checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint keeps besides the cursor: plain values, fit for JSON."""
        return self._queue.state_dict()

    def carried(self) -> list[Group]:
        """This engine's groups that go on in the next step, as they are now, unfinished answers among them; none where not is_first."""
        mine = [group for group in self._queue.carried() if group.holder == self._engine.index and self._engine.is_first]
        return [Group(group.prompt, group.responses, group.key) for group in mine]

    def write_carried(self, directory: Path, groups: list[Group]) -> list[Path]:
        """Write what `carried` gave into a checkpoint; the files."""
        return write_carried(directory, groups, self._engine.index)

    def load(self, state: dict, directory: Path) -> None:
        """Go on where the checkpoint in `directory` was taken, with any number of engines. A collective call."""
        own = read_carried(directory, self._engine.index, self._engine.count)
        for group in own:
            group.responses = self._queue.fitting(group.responses)
        told = [(group.position, group.prompt.id, [_mark(response) for response in group.responses]) for group in own]
        groups = [
            (key, name, holder, [_stub(*mark) for mark in marks])
            for holder, some in enumerate(self._engine.gather(told)) for key, name, marks in some if holder != self._engine.index
        ]  # fmt: skip
        groups += [(group.position, group.prompt.id, self._engine.index, group.responses) for group in own]
        self._queue.load(state, groups)
        self._prompts = {group.position: group.prompt for group in own}

    # ---- inside a step

    def _send(self) -> None:
        """Hand out groups to the engines with most room, as long as one has room for a group and the queue has one for it."""
        n, full = self._rollout.n, set()
        while True:
            room = [0 if self._waiting[e] or e in full else self._engine.slots - busy for e, busy in enumerate(self._busy)]
            engine = max(range(len(room)), key=lambda e: room[e])
            if room[engine] < n:
                return
            ticket = self._queue.next(engine)
            if ticket is None:
                full.add(engine)
                continue
            self._busy[engine] += len(ticket.requests)
            if engine == self._engine.index:
                self._prompts[ticket.key] = ticket.prompt
                for sample, request in ticket.requests:
                    self._begin(ticket.key * n + sample, ticket.prompt, request)

    def _begin(self, number: int, prompt: Prompt, request: Request) -> None:
        before = self._queue.so_far(*divmod(number, self._rollout.n))
        first = self._talks.begin(number, prompt, request, self._rollout.max_tokens, before)
        self._running.add(number)
        if first is None:
            self._at_once.append(number)
        else:
            self._engine.add(number, first)

    def _finished(self, stepped: list[tuple[int, Response]] | None) -> Iterator[tuple[int, Response]]:
        """Answers that are over; those in which a rollout function lets the engine go on are handed back to it."""
        at_once, self._at_once = self._at_once, []
        nothing = Response([], [], "stop", self._engine.weight_version, "")
        for number, response in [*((number, nothing) for number in at_once), *(stepped or ())]:
            self._tokens += len(response.token_ids)
            more = None if response is nothing else self._talks.go_on(number, response)
            if more is not None:
                self._engine.add(number, more)
                continue
            before = self._queue.so_far(*divmod(number, self._rollout.n))
            yield number, self._talks.end(number, response, before, self._engine.decode)

    def _advance(self, ticks: int) -> None:
        """Some steps of the schedulers, and what all ranks learn of them. ticks: steps before them."""
        n, idle = self._rollout.n, not any(self._busy)
        for tick in range(ticks + 1, ticks + self._stride + 1):
            for number, response in self._finished(self._engine.step(alone=True)):
                self._running.discard(number)
                self._freed += 1
                key, sample = divmod(number, n)
                if self._engine.is_first:
                    self._verdicts.ask(tick, key, sample, self._prompts[key], response)
        judged = self._verdicts.ready(ticks + self._stride, EVENTS, idle)
        own = {(key, sample): response for key, sample, response in judged}
        for key, sample, response in self._everyones(judged):
            self._queue.judged(key, sample, own.get((key, sample), response))
        hopeless = set(self._queue.hopeless())
        self._withdraw([number for number in self._running if number // n in hopeless])

    def _everyones(self, judged: list[tuple[int, int, Response]]) -> list[tuple[int, int, Response]]:
        """The verdicts of all engines, in their order, with stubs of the answers; notes how much room the engines have."""
        table = torch.zeros(self._engine.count, _FIRST + EVENTS * _EVENT, dtype=torch.float64)
        if self._engine.is_first:
            row = [self._freed, self._engine.waiting, len(self._verdicts), len(judged)]
            for key, sample, response in judged:
                row += [key, sample, response.verdict.score, response.finish_reason == "length"]
            table[self._engine.index, : len(row)] = torch.tensor(row, dtype=torch.float64)
        self._freed, found = 0, []
        for engine, row in enumerate(self._engine.added(table).tolist()):
            self._busy[engine] -= int(row[_FREED])
            self._waiting[engine], self._pending[engine] = int(row[_WAITING]), int(row[_PENDING])
            for number in range(int(row[_COUNT])):
                key, sample, score, truncated = row[_FIRST + number * _EVENT :][:_EVENT]
                found.append((int(key), int(sample), _stub(score, "length" if truncated else "stop", 0)))
        return found

    def _withdraw(self, numbers: list[int]) -> dict[int, Response]:
        """Give up running answers of this engine; what there is of them."""
        found = self._engine.withdraw(numbers)
        self._at_once = [number for number in self._at_once if number not in numbers]
        self._running -= set(numbers)
        self._freed += len(numbers)
        self._tokens += sum(len(response.token_ids) for response in found.values())
        for number, response in found.items():
            before = self._queue.so_far(*divmod(number, self._rollout.n))
            self._talks.go_on(number, response)
            found[number] = self._talks.end(number, response, before, lambda _: "")
        return found

    def _pause(self) -> None:
        """End what still runs: waited for verdicts count, and unfinished answers go on in the next step or are given up."""
        n = self._rollout.n
        partial: dict[int, dict[int, Response]] = {}
        for number, response in self._withdraw(sorted(self._running)).items():
            key, sample = divmod(number, n)
            partial.setdefault(key, {})[sample] = response
        begun = {key: all(response.token_ids for response in some.values()) for key, some in partial.items()}
        if not self._rollout.max_staleness:  # nothing is carried: nobody waits for verdicts
            self._verdicts.forget()
        late = self._verdicts.rest()
        told = [(key, sample, response.verdict.score, response.finish_reason) for key, sample, response in late]
        own = {(key, sample): response for key, sample, response in late}
        for known, verdicts in self._engine.gather((begun, told)):
            begun |= known
            for key, sample, score, reason in verdicts:
                self._queue.judged(key, sample, own.get((key, sample), _stub(score, reason, 0)))
        for group in self._queue.running():
            self._queue.pause(group.key, begun.get(group.key, False), partial.get(group.key, {}))
        self._busy, self._pending = [0] * self._engine.count, [0] * self._engine.count
        self._freed = 0
        open_keys = self._queue.keys
        self._prompts = {key: prompt for key, prompt in self._prompts.items() if key in open_keys}

    def _give_up(self) -> None:
        """The run stops: the step has never been. The queue is not used again."""
        self._withdraw(sorted(self._running))
        raise Stopped("stopped on request while answers were sampled")

    def _rollout_of(self, taken: Taken, enough: bool) -> Rollout:
        first, mine = self._engine.is_first, self._engine.index
        version = self._engine.weight_version
        own = [summarise(g.group(), g.responses, version) for g in taken.decided if first and g.holder == mine]
        errors, self._talks.errors = self._talks.errors, []
        measured = self._engine.throughput.take()
        gathered = self._engine.gather((own, self._tokens, self._verdicts.seconds, errors, measured))
        errors = [error for *_, some, _ in gathered for error in some]
        summaries = sorted((summary for some, *_ in gathered for summary in some), key=lambda summary: summary.position)
        numbers = (
            statistics(summaries, {group.key for group in taken.kept})
            | taken.numbers()
            | {
                "carried_groups": len(self._queue.keys),
                "sampled_tokens": sum(tokens for _, tokens, *_ in gathered),
            }
        )
        if self._rollout.function:
            numbers["tool_errors"] = len(errors)
        groups = [group.group() for group in taken.kept if first and group.holder == mine]
        waited = max(seconds for _, _, seconds, *_ in gathered)
        warnings = [*errors[:1], *([] if enough else [self._warning(taken)])]
        warnings += endings.warnings(sum(s.truncated for s in summaries), sum(s.sampled for s in summaries), self._rollout)
        engines = throughput.over_engines([theirs for *_, theirs in gathered])
        return Rollout(groups, numbers, waited, warnings, engines, measured["busy_seconds"])

    def _warning(self, taken: Taken) -> str:
        kept, usable, wanted = len(taken.kept), len(taken.kept) + len(taken.surplus), self._rollout.prompts_per_step
        then = f"training on {kept}, whole mini-batches" if kept else "no update in this step"
        if not self._rollout.dynamic_sampling:
            return f"only {usable} of {wanted} groups have an answer that was not cut off: {then}"
        return (f"only {usable} of {wanted} groups are mixed after {self._queue.started} prompts: {then} "
                "(easier or harder prompts, more answers a prompt or a higher rollout.max_prompts_per_step would give more)")  # fmt: skip


def _mark(response: Response) -> tuple[float | None, str, int]:
    return None if response.verdict is None else response.verdict.score, response.finish_reason, response.weight_version


def _stub(score: float | None, finish_reason: str, weight_version: int) -> Response:
    """What stands for an answer of another engine: the queue asks no more of it."""
    verdict = None if score is None else Verdict(score, "")
    return Response([], [], finish_reason, weight_version, "", verdict=verdict)

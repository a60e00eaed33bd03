"""A rollout step of the queue and its engines, followed answer by answer with a seeded draw of lengths and verdicts.

Which groups are sent, waited for, carried and thrown away is as in rollout/queue.py; the scheduler steps' times are decoding.py's. Time
goes in strides of some tokens: whoever ends within one makes room at its end.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_nft.config import Config
from megatron_nft.mixing import LEAST_SHARE, chance, is_short
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.workload import SEED, Workload

STRIDES, STEP = 40, 8  # strides of a mean answer; tokens of a stride, at least
BACK = 0.97  # of the KV cache: up to here an answer that waits is let in again
WARM_UP = 2  # rollout steps, beyond the staleness, until what is carried has settled
MEASURED = 2  # rollout steps that are averaged where answers are carried


@dataclass(frozen=True)
class Order:
    """What decides which groups are trained on."""

    wanted: int
    limit: int  # groups that may be sent in a step
    dynamic: bool
    finished: bool  # in the order of finishing
    staleness: int
    resumes: bool
    ahead: int
    hopeless: int | None

    @classmethod
    def of(cls, config: Config) -> "Order":
        rollout = config.rollout
        carries = rollout.max_staleness > 0
        resumes = carries and rollout.unfinished == "resume"
        ahead = rollout.max_staleness if resumes or rollout.mode == "served" else 0
        limit = rollout.max_prompts_per_step or 8 * rollout.prompts_per_step
        return cls(
            rollout.prompts_per_step, limit if rollout.dynamic_sampling else rollout.prompts_per_step, rollout.dynamic_sampling,
            rollout.order == "finished", rollout.max_staleness, resumes, ahead, rollout.hopeless_after,
        )  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """A rollout step, on average."""

    seconds: float
    tail: float  # of them, after the last group was sent
    sent: float  # groups
    kept: float
    sampled: float  # tokens, those thrown away included
    kept_tokens: float  # of responses
    reread: float  # tokens of prompts and of what was interrupted, read again
    running: float  # answers an engine, on average over time
    most_running: float
    steps: float  # of the schedulers


@lru_cache(maxsize=512)
def simulate(work: Workload, order: Order, engine: Engine, engines: int) -> Generation:
    """A rollout step in the steady state. Deterministic."""
    fleet = _Fleet(work, order, engine, engines)
    carried = order.staleness > 0
    for _ in range(WARM_UP + order.staleness if carried else 0):
        fleet.step()
    found = [fleet.step() for _ in range(MEASURED if carried else 1)]
    return Generation(*(float(np.mean([getattr(f, name) for f in found])) for name in Generation.__dataclass_fields__))


class _Fleet:
    """All engines, the groups that are open, in the order of starting, and their answers that are not finished, in the same order."""

    GROUPS = ("holder", "born", "left", "rights", "wrongs", "tokens")
    ANSWERS = ("of", "length", "done", "right", "waits")

    def __init__(self, work: Workload, order: Order, engine: Engine, engines: int):
        self.work, self.order, self.engine, self.engines = work, order, engine, engines
        self.rng, self.version, self.slots = np.random.default_rng(SEED), 0, max(engine.slots, work.n)
        self.stride = max(STEP, int(work.mean / STRIDES))
        # of a group: its engine, the version it was started from, answers without a verdict, right and wrong verdicts, tokens finished
        for name in self.GROUPS:
            setattr(self, name, np.zeros(0, np.int64))
        # of an answer: its group, tokens in the end and so far, its verdict, whether it waits for room in the KV cache
        for name in self.ANSWERS:
            setattr(self, name, np.zeros(0, bool if name in ("right", "waits") else np.int64))

    # ---- what is known of the open groups

    @property
    def _mixed(self) -> np.ndarray:
        """Groups of which two verdicts differ."""
        return (self.rights > 0) & (self.wrongs > 0)

    def _ready(self) -> np.ndarray:
        """Groups that would be trained on if the step ended now: see Queue._choose."""
        complete = self.left == 0
        usable = complete & self._mixed if self.order.dynamic else complete
        if not self.order.finished:
            waited = ~complete & (self.version - self.born >= self.order.staleness)
            if waited.any():
                usable[np.argmax(waited) :] = False
        return np.flatnonzero(usable)

    def _per_engine(self, values: np.ndarray | None = None) -> np.ndarray:
        """Sums over an engine's answers: of `values`, or how many they are."""
        return np.bincount(self.holder[self.of], values, self.engines)

    @property
    def _held(self) -> np.ndarray:
        """Tokens of each answer in the KV cache."""
        return self.done + self.work.prompt

    # ---- a step

    def step(self) -> Generation:
        """One rollout step, from where the one before ended."""
        self._begin()
        clock = tail = used = most = ticks = 0.0
        # what goes on is read again, but for servers, which keep their caches
        prompts = self._per_engine(self._held) if self.engine.lockstep else np.zeros(self.engines)
        while True:
            fresh = self._send()
            ready = self._ready()
            if len(ready) >= self.order.wanted or not len(self.of):
                return self._take(ready[: self.order.wanted], clock, tail, used / clock if clock else 0.0, most, ticks)
            seconds, count, running = self._advance(prompts + fresh)
            prompts = np.zeros(self.engines)
            clock, ticks, used, most = clock + seconds, ticks + count, used + seconds * running, max(most, running)
            tail = 0.0 if fresh.any() else tail + seconds

    def _begin(self) -> None:
        self.version, self.started = self.version + 1, 0
        self.sampled = self.reread = 0.0
        self._remove(self.version - self.born > self.order.staleness)

    def _send(self) -> np.ndarray:
        """Groups to the engines with most room, as long as the queue has one; tokens of their prompts [engines]."""
        n, fresh, holders = self.work.n, np.zeros(self.engines), []
        whole = n * self.work.prompt
        held = self._per_engine(self._held)
        waiting = self._per_engine(self.waits) > 0
        room = np.where(waiting, 0, self.slots - self._per_engine())
        room = np.where(
            (held > 0) & (held + whole > self.engine.kv_tokens), 0, room
        )  # an engine with nothing to do takes a group, however long
        for _ in range(self._number_to_send()):
            engine = int(np.argmax(room))
            if room[engine] < n:
                break
            holders.append(engine)
            fresh[engine] += whole
            room[engine] = room[engine] - n if held[engine] + fresh[engine] + whole <= self.engine.kv_tokens else 0
        if holders:
            self._open(np.array(holders))
        return fresh

    def _number_to_send(self) -> int:
        """As Queue._wants_more decides, for all that are missing."""
        order, count = self.order, 0
        if not order.dynamic:
            return order.wanted - self.started
        share, n = max(self.work.mixed, LEAST_SHARE), self.work.n
        mixed = int(self._mixed.sum())
        alike = (n - self.left)[(self.left > 0) & ~self._mixed]
        chances = np.array([chance(share, known, n) for known in range(n)])[alike]
        promised, spread = float(chances.sum()), float((chances * (1 - chances)).sum())
        while self.started + count < order.limit:
            if not is_short(promised, spread, order.wanted - mixed) and not (
                order.ahead and mixed + promised < order.wanted * (1 + order.ahead)
            ):
                break
            count, promised, spread = count + 1, promised + share, spread + share * (1 - share)
        return count

    def _open(self, holders: np.ndarray) -> None:
        count, n, rng = len(holders), self.work.n, self.rng
        mixed = rng.random(count) < self.work.mixed
        rights = np.where(mixed, rng.integers(1, max(n, 2), count), np.where(rng.random(count) < 0.5, n, 0))
        ranks = rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1)
        new, none = np.arange(len(self.holder), len(self.holder) + count), np.zeros(count, np.int64)
        groups = (holders, none + self.version, none + n, none, none, none)
        answers = (np.repeat(new, n), self.work.draw(count * n, rng), np.zeros(count * n, np.int64), (ranks < rights[:, None]).ravel(),
                   np.zeros(count * n, bool))  # fmt: skip
        for name, more in zip((*self.GROUPS, *self.ANSWERS), (*groups, *answers), strict=True):
            setattr(self, name, np.concatenate([getattr(self, name), more]))
        self.started += count

    def _advance(self, prompts: np.ndarray) -> tuple[float, int, float]:
        """A stride: seconds, scheduler steps, and answers that ran on an engine."""
        runs = self._within_cache()
        back = self.waits & runs  # what made room is read again
        prompts = prompts + self._per_engine(self._held * back)
        self.reread += float(prompts.sum())
        self.waits = ~runs
        stride = min(self.stride, int((self.length - self.done)[runs].max()))
        sampled = np.minimum(self.length - self.done, stride) * runs
        running = self._per_engine(sampled) / stride
        context = self._per_engine(sampled * (self._held + sampled / 2)) / stride
        each = stride * self.engine.seconds(running, context) + self._reading(prompts, running)
        self.done = self.done + sampled
        self.sampled += float(sampled.sum())
        self._finish()
        slowest = each.max() if self.engine.lockstep else each.sum() / max((each > 0).sum(), 1)
        return float(slowest), stride, float(running.mean())

    def _reading(self, prompts: np.ndarray, running: np.ndarray) -> np.ndarray:
        """What prompts add to the steps that read them."""
        busy = np.maximum(running, 1.0)
        return np.where(prompts > 0, self.engine.seconds(busy, busy, prompts) - self.engine.seconds(busy, busy), 0.0)

    def _within_cache(self) -> np.ndarray:
        """Answers that the KV cache has room for, those that were sent first coming first. The others wait; one that does comes back when
        there is a little more room than it needs."""
        held, limit = self._held + self.stride, self.engine.kv_tokens
        holder = self.holder[self.of]
        if np.bincount(holder, held, self.engines).max() <= limit and not self.waits.any():
            return np.ones(len(held), bool)
        order = np.argsort(holder, kind="stable")
        sums, sorted_holder = np.cumsum(held[order]), holder[order]
        firsts = np.searchsorted(sorted_holder, np.arange(self.engines))
        within = sums - np.concatenate([[0], sums])[firsts][sorted_holder]
        runs = np.zeros(len(held), bool)
        runs[order] = within <= np.where(self.waits[order], BACK * limit, limit)
        runs[order[firsts[firsts < len(order)]]] = True  # nothing stands still
        return runs

    def _finish(self) -> None:
        """Verdicts of the answers that have ended; groups that are given up for them."""
        over = self.done >= self.length
        count = len(self.holder)
        self.left = self.left - np.bincount(self.of[over], minlength=count)
        self.rights = self.rights + np.bincount(self.of[over & self.right], minlength=count)
        self.wrongs = self.wrongs + np.bincount(self.of[over & ~self.right], minlength=count)
        self.tokens = self.tokens + np.bincount(self.of[over], self.length[over], count).astype(np.int64)
        for name in self.ANSWERS:
            setattr(self, name, getattr(self, name)[~over])
        if self.order.hopeless is not None:
            self._remove((self.left > 0) & ~self._mixed & (self.rights + self.wrongs >= self.order.hopeless))

    def _take(self, kept: np.ndarray, clock: float, tail: float, running: float, most: float, ticks: float) -> Generation:
        """End the step: what is trained on, and what is thrown away, leaves."""
        tokens, complete = float(self.tokens[kept].sum()), self.left == 0
        gone = complete & ~self._mixed if self.order.dynamic else complete.copy()
        gone[kept] = True
        gone |= ~complete & (not self.order.resumes) | (not self.order.staleness)
        found = Generation(clock, tail, self.started, len(kept), self.sampled, tokens, self.reread, running, most, ticks)
        self._remove(gone)
        return found

    def _remove(self, gone: np.ndarray) -> None:
        if not gone.any():
            return
        stays, renumbered = ~gone[self.of], np.cumsum(~gone) - 1
        for name in self.ANSWERS:
            setattr(self, name, getattr(self, name)[stays])
        self.of = renumbered[self.of]
        for name in self.GROUPS:
            setattr(self, name, getattr(self, name)[~gone])

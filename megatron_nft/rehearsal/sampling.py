"""A rollout step of the real queue (rollout/queue.py), driven by engines that have no model: lengths and verdicts are drawn, a scheduler
step takes as long as planner/decoding.py says. Answers that end within a stride of a few tokens are judged at its end; between two strides
nothing changes but the contexts."""

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.workload import SEED, Workload
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rollout.queue import Queue
from megatron_nft.trajectories import Group, Prompt, Response, Verdict

STRIDES = 400  # in a mean answer, at least
SETTLING = 2  # rollout steps beyond the staleness until what is carried is as in the middle of a run; where nothing is carried, one until
# the queue has a mixed share of its own to reckon with


@dataclass
class Sampled:
    """What a rollout step gave, and how its engines spent it."""

    groups: list[Group] = field(default_factory=list)  # to train on, in the order of starting; token ids are ranges
    seconds: float = 0.0
    tail: float = 0.0  # of them, after the last prompt was sent
    steps: int = 0  # of the schedulers
    sent: int = 0  # prompts
    tokens: int = 0  # sampled, those thrown away included
    reread: int = 0  # tokens of prompts, and of answers that had to make room in the KV cache or were interrupted
    preempted: int = 0  # answers that had to make room
    idle: float = 0.0  # share of the engines' places without an answer, over the steps
    enough: bool = False  # whether there are as many mixed groups as the step wants


def sample(config: Config, hf: dict, cluster: Cluster, kv_tokens: int) -> Sampled:
    """The groups of a rollout step in the middle of a run, and its time. kv_tokens: that an engine's KV cache holds.

    Engines that share the trainers' processes take each step together (rollout/sampler.py), as slow as the slowest; servers are each as
    fast as they are, of which the mean is taken.
    """
    staleness = config.rollout.max_staleness
    run = _Run(config, Engine.of(config, hf, cluster, kv_tokens), cluster.engines)
    before = SETTLING + staleness if staleness else int(config.rollout.dynamic_sampling)
    for step in range(before):
        run.step(step)
    return run.step(before)


@dataclass
class _Answer:
    """An answer that an engine has."""

    engine: int
    key: int
    sample: int
    prompt: int  # tokens that are read before it is written: of the prompt
    done: int  # tokens it had when it was last admitted
    length: int  # tokens in the end
    since: int = -1  # the step before its first token since then; -1: it waits for room


class _Run:
    """Queue, prompts and engines from step to step."""

    def __init__(self, config: Config, engine: Engine, engines: int):
        self.config, self.rollout, self.engine, self.count = config, config.rollout, engine, engines
        self.work = Workload.of(config)
        limit = self.rollout.max_prompts_per_step or 8 * self.rollout.prompts_per_step
        self.cursor = Cursor(PromptSet(_prompts(2 * limit, self.work.prompt)), config.seed, config.data.shuffle)
        self.queue = Queue(self.cursor, config)
        self.answers: dict[tuple[int, int], _Answer] = {}  # by key and sample
        self.ends: list[tuple[int, int, int, int]] = []  # heap of (step, key, sample, since)
        self.waiting: list[deque[_Answer]] = [deque() for _ in range(engines)]
        self.order: list[dict[tuple[int, int], None]] = [{} for _ in range(engines)]  # admitted answers, the last the newest
        self.running, self.context, self.fresh = (np.zeros(engines, np.int64) for _ in range(3))
        self.stride = max(1, int(self.work.mean / STRIDES))
        self.now = 0  # scheduler steps so far
        self.drawn: dict[int, tuple[list[int], list[float]]] = {}

    def step(self, number: int) -> Sampled:
        """One rollout step."""
        found, used = Sampled(), 0
        for key in self.queue.begin(number, number):
            self._drop(key)
        start = self.now
        while True:
            if self._send(found):
                found.tail = 0.0
            if self.queue.enough or not self.answers and self.queue.exhausted:
                break
            steps, seconds = self._advance(found)
            found.seconds, found.tail = found.seconds + seconds, found.tail + seconds
            used += steps * int(self.running.sum())
            self._finish(found)
        found.steps, found.sent, found.enough = self.now - start, self.queue.started, self.queue.enough
        found.idle = 1 - used / (found.steps * self.count * self.engine.slots) if found.steps else 0.0
        found.groups = [group.group() for group in self.queue.take().kept]
        for key in {key for key, _ in self.answers} - self.queue.keys:
            self._drop(key)
        if self.rollout.mode == "colocated":
            self._pause()
        return found

    # ---- what is drawn

    def _draw(self, key: int) -> tuple[list[int], list[float]]:
        """Lengths and verdicts of a group's answers: the same whenever they are asked for. Answers that are cut off are wrong, whatever
        becomes of their groups (reward.truncated); the mixed share is that of the outcome."""
        if key not in self.drawn:
            rng, n = np.random.default_rng((SEED, key)), self.work.n
            lengths = self.work.draw(n, rng)
            able = rng.permutation(np.flatnonzero(lengths < self.work.cap))
            if n > 1 and len(able) and rng.random() < self.work.mixed:
                right = int(rng.integers(1, min(n - 1, len(able)) + 1))
            else:
                right = n * int(rng.integers(2)) if len(able) == n else 0
            scores = np.zeros(n)
            scores[able[:right]] = 1.0
            self.drawn[key] = lengths.tolist(), scores.tolist()
        return self.drawn[key]

    # ---- the schedulers

    def _send(self, found: Sampled) -> bool:
        """Groups to the engines with most room, as Sampler._send hands them out; whether there was one."""
        n, sent, waiting = self.rollout.n, False, self.waiting
        room = [0 if waiting[e] else self.engine.slots - int(self.running[e]) for e in range(self.count)]
        while True:
            engine = max(range(self.count), key=room.__getitem__)
            if room[engine] < n:
                return sent
            ticket = self.queue.next(engine)
            if ticket is None and not self.rollout.max_staleness:
                return sent  # no group goes on anywhere: no other engine would be told otherwise
            if ticket is None:
                room[engine] = 0
                continue
            sent = True
            room[engine] -= len(ticket.requests)
            for sample, request in ticket.requests:
                prompt = len(ticket.prompt.token_ids)
                answer = _Answer(engine, ticket.key, sample, prompt, len(request.token_ids) - prompt, self._draw(ticket.key)[0][sample])
                self.answers[ticket.key, sample] = answer
                self.waiting[engine].append(answer)
            self._admit(engine, found)
            if waiting[engine]:
                room[engine] = 0

    def _admit(self, engine: int, found: Sampled) -> None:
        """Answers that wait start where there is room for what they have."""
        waiting = self.waiting[engine]
        while waiting and self.running[engine] < self.engine.slots:
            answer = waiting[0]
            tokens = answer.prompt + answer.done
            if self.context[engine] + tokens + self.running[engine] >= self.engine.kv_tokens and self.running[engine]:
                return
            waiting.popleft()
            answer.since = self.now
            self.running[engine] += 1
            self.context[engine] += tokens
            self.fresh[engine] += tokens
            found.reread += tokens
            self.order[engine][answer.key, answer.sample] = None
            heapq.heappush(self.ends, (self.now + answer.length - answer.done, answer.key, answer.sample, self.now))

    def _advance(self, found: Sampled) -> tuple[int, float]:
        """All engines to the next event: an answer has ended, or a cache is full. Scheduler steps, and seconds."""
        while self.ends and not self._is_current(self.ends[0]):
            heapq.heappop(self.ends)
        steps = max(self.ends[0][0] - self.now, self.stride) if self.ends else 1
        crowded = self.running > 1
        if crowded.any():
            room = (self.engine.kv_tokens - self.context[crowded]) // self.running[crowded]
            steps = max(1, min(steps, int(room.min())))
        middle = self.context + self.running * (steps - 1) / 2
        each = steps * self.engine.seconds(self.running, middle)
        if self.fresh.any():  # what was admitted is read in the first of these steps
            each = each + self.engine.seconds(self.running, self.context, self.fresh) - self.engine.seconds(self.running, self.context)
            self.fresh[:] = 0
        self.now += steps
        self.context += self.running * steps
        found.tokens += steps * int(self.running.sum())
        return steps, float(each.max() if self.engine.lockstep else each[self.running > 0].mean())

    def _is_current(self, end: tuple[int, int, int, int]) -> bool:
        answer = self.answers.get(end[1:3])
        return answer is not None and answer.since == end[3]

    def _finish(self, found: Sampled) -> None:
        """Answers that end now are judged; full caches make room, and what waits goes on where there is some."""
        while self.ends and self.ends[0][0] <= self.now:
            end = heapq.heappop(self.ends)
            if not self._is_current(end):
                continue
            answer = self.answers[end[1:3]]
            found.tokens -= self.now - end[0]
            self._leave(answer)
            del self.answers[answer.key, answer.sample]
            reason = "length" if answer.length >= self.rollout.max_tokens else "stop"
            score = self._draw(answer.key)[1][answer.sample]
            verdict = Verdict(score, "right" if score else "wrong")
            self.queue.judged(answer.key, answer.sample, _response(answer.length, reason, verdict))
        for key in self.queue.hopeless():
            self._drop(key)
        for engine in np.flatnonzero(self.context + self.running > self.engine.kv_tokens):
            self._make_room(int(engine), found)
        for engine in range(self.count):
            self._admit(engine, found)

    def _make_room(self, engine: int, found: Sampled) -> None:
        """The newest answers give up their place in the cache, as in vLLM, and are read again later."""
        while self.context[engine] + self.running[engine] > self.engine.kv_tokens and self.running[engine] > 1:
            answer = self.answers[next(reversed(self.order[engine]))]
            self._leave(answer)
            answer.done, answer.since = answer.done + self.now - answer.since, -1
            self.waiting[engine].appendleft(answer)
            found.preempted += 1

    def _leave(self, answer: _Answer) -> None:
        self.running[answer.engine] -= 1
        self.context[answer.engine] -= answer.prompt + answer.done + self.now - answer.since
        del self.order[answer.engine][answer.key, answer.sample]

    def _drop(self, key: int) -> dict[int, int]:
        """Give up a group's answers; the tokens that each has."""
        tokens = {}
        for sample in range(self.rollout.n):
            answer = self.answers.pop((key, sample), None)
            if answer is None:
                continue
            if answer.since < 0:
                self.waiting[answer.engine].remove(answer)
                tokens[sample] = answer.done
            else:
                self._leave(answer)
                tokens[sample] = answer.done + self.now - answer.since
        return tokens

    def _pause(self) -> None:
        """The end of a colocated step: what runs goes on in the next one, or is given up."""
        for group in self.queue.running():
            tokens = self._drop(group.key)
            begun = bool(tokens) and all(tokens.values())
            self.queue.pause(group.key, begun, {sample: _response(count, "unfinished") for sample, count in tokens.items()})


def _response(tokens: int, reason: str, verdict: Verdict | None = None) -> Response:
    """Of so many tokens, which are never looked at."""
    return Response(range(tokens), [], reason, 0, "", verdict=verdict)


def _prompts(count: int, tokens: int) -> list[Prompt]:
    return [Prompt(f"drawn/{number}", "", "", (0,) * tokens, "drawn") for number in range(count)]

"""The simulated rollout step against the program's own queue, driven token by token, and against what can be worked out by hand."""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest

from megatron_nft.config import Config
from megatron_nft.planner import decoding, generation
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.generation import Order, simulate
from megatron_nft.planner.hardware import find
from megatron_nft.planner.models import find as find_model
from megatron_nft.planner.workload import Workload
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rollout import queue, sampler
from megatron_nft.trajectories import Response, Verdict
from tests.unit.rollout.fakes import MIXED, fake_prompt

ENGINE = Engine(find("H100"), 1, 4, 512, 1000, 1e7, 1e7, 4096, False, False, slots=24, kv_tokens=10**9, lockstep=2)
WORK = Workload(wanted=24, n=4, prompt=5, mean=16, sigma=0.8, cap=80, mixed=0.5, per_update=8)
SEEDS = range(8)


def order(**settings) -> Order:
    config = Config()
    config.rollout.prompts_per_step = WORK.wanted
    for name, value in settings.items():
        setattr(config.rollout, name, value)
    return Order.of(config)


@dataclass
class Step:
    steps: float
    sent: float
    sampled: float


class Reference:
    """Two engines that write one token of every answer at a time, and the program's queue, with a verdict the moment an answer ends."""

    def __init__(self, seed: int, **settings):
        config = Config(seed=seed)
        rollout = config.rollout
        rollout.prompts_per_step, rollout.n, rollout.max_tokens = WORK.wanted, WORK.n, WORK.cap
        config.train.prompts_per_update = WORK.per_update
        for name, value in settings.items():
            setattr(rollout, name, value)
        self.queue = queue.Queue(Cursor(PromptSet([fake_prompt(MIXED, i) for i in range(600)]), seed, shuffle=False), config)
        self.queue._share = [WORK.mixed * 1000, 1000]  # as after many steps
        self.rng = np.random.default_rng(seed)
        self.lengths: dict[tuple[int, int], int] = {}
        self.scores: dict[int, np.ndarray] = {}
        self.written: dict[tuple[int, int], int] = defaultdict(int)
        self.version = 0

    def step(self, number: int) -> Step:
        self.queue.begin(number, self.version)
        self.running: list[set[tuple[int, int]]] = [set(), set()]
        steps = sampled = 0
        while True:
            self._send()
            if self.queue.enough:
                break
            steps += 1
            for engine in self.running:
                for key, sample in sorted(engine):
                    self.written[key, sample] += 1
                    sampled += 1
                    if self.written[key, sample] >= self.lengths[key, sample]:
                        engine.discard((key, sample))
                        self.queue.judged(key, sample, self._response(key, sample))
        sent = self.queue.started
        self.queue.take()
        for group in self.queue.running():
            partial = {s: self._response(group.key, s, done=False) for s in range(WORK.n) if not queue.has_verdict(group.responses[s])}
            self.queue.pause(group.key, True, partial)
        self.version += 1
        return Step(steps, sent, sampled)

    def _send(self) -> None:
        while True:
            engine = min(self.running, key=len)
            if ENGINE.slots - len(engine) < WORK.n or (ticket := self.queue.next()) is None:
                return
            if ticket.key not in self.scores:
                self._draw(ticket.key)
            engine.update((ticket.key, sample) for sample, _ in ticket.requests)

    def _draw(self, key: int) -> None:
        mixed, n = self.rng.random() < WORK.mixed, WORK.n
        rights = self.rng.integers(1, n) if mixed else n * int(self.rng.random() < 0.5)
        self.scores[key] = self.rng.permutation(n) < rights
        for sample, length in enumerate(WORK.draw(n, self.rng)):
            self.lengths[key, sample] = int(length)
            self.written[key, sample] = 0

    def _response(self, key: int, sample: int, done: bool = True) -> Response:
        count, score = self.written[key, sample], float(self.scores[key][sample])
        verdict = Verdict(score, "right" if score else "wrong") if done else None
        return Response([7] * count, [-1.0] * count, "stop" if done else "unfinished", self.version, "", verdict=verdict)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_staleness": 0},
        {"order": "finished", "max_staleness": 0},
        pytest.param({"order": "started", "max_staleness": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_simulation_sends_writes_and_waits_as_the_queue_does(settings, monkeypatch):
    """Both draw answers of their own: the steps, which the longest answers decide, scatter most. Where answers are carried, the queue
    also learns the share of mixed groups from few, which the simulation knows."""
    carried = settings["max_staleness"] > 0
    expected, found = [], []
    monkeypatch.setattr(generation, "STEP", 1)
    for seed in SEEDS:
        reference = Reference(seed, **settings)
        expected += [reference.step(number) for number in range(1, 6 if carried else 2)][3 if carried else 0 :]
        monkeypatch.setattr(generation, "SEED", seed)
        simulate.cache_clear()
        found.append(simulate(WORK, order(**settings), ENGINE, 2))
    simulate.cache_clear()
    for name in ("steps", "sent", "sampled"):
        of_queue, of_plan = (np.mean([getattr(step, name) for step in steps]) for steps in (expected, found))
        assert of_plan == pytest.approx(of_queue, rel=0.2 if carried or name == "steps" else 0.1), name


def test_engines_tell_each_other_as_often_as_the_sampler_says():
    assert (decoding.TELL_EVERY, decoding.ASK_EVERY) == (sampler.TELL_EVERY, sampler.ASK_EVERY)


@pytest.mark.parametrize(
    "lockstep, tp, coupled, hops",
    [
        (0, 4, False, 0),  # servers
        (128, 4, False, 8 * 254 + 254),  # of 64 steps: every eighth tells, and once it is asked
        (4, 4, False, 64 * 6 + 8 * 6),  # one engine: its ranks tell in each step
        (128, 4, True, 8 * 254 + 254 + 64 * 2 * 62),  # and vLLM's own sums, over 32 engines
    ],
)
def test_sums_over_ranks_in_64_steps(lockstep, tp, coupled, hops):
    engine = replace(ENGINE, lockstep=lockstep, tp=tp, coupled=coupled)
    alone = replace(ENGINE, lockstep=0, tp=tp)
    assert 64 * (engine.host(10) - alone.host(10)) == pytest.approx(hops * decoding.GLOO_HOP)


@pytest.mark.parametrize("experts, mode, coupled", [(0, "colocated", False), (8, "colocated", True), (8, "served", False)])
def test_only_colocated_mixtures_are_coupled(experts, mode, coupled):
    hf = find_model("Qwen2.5-1.5B").hf
    if experts:
        hf = hf | {"model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    config = Config()
    config.plan.nodes, config.rollout.mode = 1, mode
    config.rollout.served.count = 4
    assert Engine.of(config, hf, Cluster.of(config), 10**6).coupled == coupled


def test_an_engine_with_nothing_to_do_takes_a_group_however_long():
    """Its prompts alone are more than the KV cache holds: some answers wait for others."""
    work, order = replace(WORK, prompt=30, mixed=1.0), Order(24, 24, False, False, 0, False, 0, None)
    found = simulate(work, order, replace(ENGINE, kv_tokens=110), 2)
    assert found.kept == 24 and found.sampled > 0


def test_alike_answers_that_all_run_at_once_take_their_length_in_steps():
    """Two engines, 16 answers each, of 100 tokens: 100 scheduler steps, all of them with 16 answers."""
    work = replace(WORK, wanted=8, mean=100, sigma=0.0, cap=100, mixed=1.0)
    found = simulate(work, Order(8, 8, False, False, 0, False, 0, None), ENGINE, 2)
    assert (found.steps, found.sampled, found.kept_tokens, found.sent) == (100, 3200, 3200, 8)
    each = sum(float(ENGINE.seconds(16, 16 * (5 + done))) for done in range(100))
    reading = float(ENGINE.seconds(16, 16, 80) - ENGINE.seconds(16, 16))
    assert found.seconds == pytest.approx(each + reading, rel=0.02)


def test_a_cache_for_half_of_the_answers_takes_longer_and_reads_again():
    """All 16 of an engine run while they are short; in the end no more than 8 do."""
    work = replace(WORK, wanted=8, mean=100, sigma=0.0, cap=100, mixed=1.0)
    tight = replace(ENGINE, kv_tokens=8 * (5 + 100 + 8))
    found = simulate(work, Order(8, 8, False, False, 0, False, 0, None), tight, 2)
    assert 130 <= found.steps <= 200 and found.sampled == 3200
    assert found.reread > 2 * 16 * 5


def test_hopeless_groups_are_not_written_to_the_end():
    given_up = simulate(WORK, order(hopeless_after=2, max_staleness=0), ENGINE, 2)
    assert given_up.kept == WORK.wanted and given_up.sampled / given_up.sent < 0.95 * WORK.n * WORK.mean_length


def test_the_same_each_time():
    simulate.cache_clear()
    first = simulate(WORK, order(max_staleness=0), ENGINE, 2)
    simulate.cache_clear()
    assert simulate(WORK, order(max_staleness=0), ENGINE, 2) == first

"""Dynamic sampling with fake engines: when it stops, what it keeps, what it counts, and that layout changes nothing."""

import threading
import time
from concurrent.futures import Future

import pytest

from megatron_nft.config import Config
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.rollout import Request, Rollout, Sampler
from megatron_nft.rollout.queue import seed_of
from megatron_nft.rollout.verdicts import answer
from megatron_nft.trajectories import Group, Verdict
from tests.support import one_bucket
from tests.unit.rollout.fakes import CHANCE, MIXED, RIGHT, WRONG, FakeEngine, fake_prompt, on_ranks

N = 4


@pytest.fixture(scope="module")
def judge():
    with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
        yield judge


def settings(wanted: int, per_update: int = 1, **rollout) -> Config:
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.train.prompts_per_update = wanted, N, per_update
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return config


def sampler(judge, kinds: list[int], config: Config, engine: FakeEngine | None = None, shuffle: bool = False) -> Sampler:
    prompts = PromptSet([fake_prompt(kind, i) for i, kind in enumerate(kinds)])
    return Sampler(engine or FakeEngine(N), judge, Cursor(prompts, config.seed, shuffle, config.data.most_skipped), config)


def positions(rollout: Rollout) -> list[int]:
    return [group.position for group in rollout.groups]


def content(groups: list[Group]) -> list[tuple]:
    """All that training sees of the groups, in order of position."""
    return [
        (g.position, g.prompt.id, [(r.token_ids, r.logprobs, r.verdict, r.finish_reason) for r in g.responses])
        for g in sorted(groups, key=lambda g: g.position)
    ]


def test_sends_until_enough_groups_are_mixed(judge):
    found = sampler(judge, [MIXED, RIGHT, WRONG, MIXED, WRONG, MIXED, MIXED, RIGHT], settings(4)).groups(1)
    assert positions(found) == [0, 3, 5, 6] and all(group.is_mixed for group in found.groups) and found.warnings == []


def test_what_was_sent_beyond_comes_again_in_the_next_step(judge):
    """Prompts are sent in advance of what is known; the ones after the last that was needed are not lost."""
    own = sampler(judge, [MIXED] * 12, settings(3))
    first, second = own.groups(1), own.groups(2)
    assert positions(first) == [0, 1, 2] and first.statistics["prompts_sent"] > 3
    assert [group.prompt.id for group in second.groups] == ["set/3", "set/4", "set/5"]


def test_as_many_prompts_are_sent_as_the_share_of_mixed_groups_asks_for(judge):
    """A third is assumed to be mixed: 15 are sent for 3; the more of them are found to be mixed, the fewer."""
    own = sampler(judge, [MIXED] * 60, settings(3))
    sent = [own.groups(step).statistics["prompts_sent"] for step in range(1, 5)]
    assert sent[0] == 15 and sent[-1] == 4 and sent == sorted(sent, reverse=True)


def test_max_prompts_per_step_bounds_a_hopeless_step(judge):
    found = sampler(judge, [RIGHT, WRONG], settings(2, max_prompts_per_step=6)).groups(1)
    assert found.groups == [] and found.statistics["prompts_sent"] == found.statistics["groups_decided"] == 6
    assert found.statistics["mixed_share"] == found.statistics["kept_correct_rate"] == 0.0
    assert len(found.warnings) == 1 and "only 0 of 2 groups are mixed after 6 prompts" in found.warnings[0]


@pytest.mark.parametrize("mixed, kept", [(5, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_keeps_whole_mini_batches_where_there_is_one(judge, mixed, kept):
    found = sampler(judge, [MIXED] * mixed + [RIGHT] * (6 - mixed), settings(6, per_update=2, max_prompts_per_step=6)).groups(1)
    assert positions(found) == list(range(kept))
    assert found.statistics["groups_kept"] == kept and found.statistics["surplus_groups"] == mixed - kept
    assert f"only {mixed} of 6" in found.warnings[0] and f"training on {kept}" in found.warnings[0]


def test_statistics_count_every_decided_group(judge):
    """Two mixed (r̂ 1/2, 3 tokens), one right (2 tokens), one wrong (5 tokens, cut off): 16 answers, 52 tokens."""
    statistics = sampler(judge, [MIXED, RIGHT, WRONG, MIXED], settings(4, max_prompts_per_step=4)).groups(1).statistics
    assert statistics == {
        "correct_rate": 0.5, "kept_correct_rate": 0.5, "mixed_share": 0.5, "all_right_share": 0.25, "all_wrong_share": 0.25,
        "prompts_sent": 4, "prompts_skipped": 0, "groups_decided": 4, "groups_kept": 2, "surplus_groups": 0, "hopeless_groups": 0,
        "stale_groups": 0, "carried_groups": 0, "response_length": 52 / 16, "kept_response_length": 3, "truncated_share": 0.25,
        "sampled_tokens": 52, "staleness": 0, "staleness_max": 0, "idle_share": 1 - 52 / (6 * 1000),
        "outcome/right": 8, "outcome/wrong": 8, "outcome/no_answer": 0, "outcome/timed_out": 0, "outcome/crashed": 0,
    }  # fmt: skip


def test_without_dynamic_sampling_one_draw_is_all(judge):
    """Every group is kept, mixed or not; as many prompts are sent as are trained on."""
    config = settings(4, dynamic_sampling=False)
    found = sampler(judge, [MIXED, RIGHT, WRONG, RIGHT, MIXED], config).groups(1)
    assert positions(found) == [0, 1, 2, 3] and found.warnings == []
    assert found.statistics["prompts_sent"] == 4 and found.statistics["mixed_share"] == 0.25


def test_dropped_answers_leave_rates_and_lengths_and_are_counted_as_sampled(judge):
    """WRONG answers are cut off at 5 tokens. Dropped: no group, no length; 16 sampled answers, 52 tokens, a quarter cut off."""
    config = settings(4, max_prompts_per_step=4)
    config.reward.truncated = "drop"
    found = sampler(judge, [MIXED, RIGHT, WRONG, MIXED], config).groups(1)
    expected = {"correct_rate": 2 / 3, "all_wrong_share": 0, "response_length": 32 / 12, "truncated_share": 0.25, "sampled_tokens": 52,
                "prompts_sent": 4, "outcome/wrong": 8}  # fmt: skip
    assert {name: found.statistics[name] for name in expected} == pytest.approx(expected) and positions(found) == [0, 3]
    config.rollout.dynamic_sampling = False
    alone = sampler(judge, [WRONG], config).groups(1)
    assert alone.groups == [] and "have an answer that was not cut off" in alone.warnings[0]
    assert alone.statistics["correct_rate"] == alone.statistics["response_length"] == 0.0


@pytest.mark.parametrize("truncated, trained", [("wrong", 5), ("mask", 0)])
def test_truncated_answers_that_stay_count_in_rates_and_lengths(judge, truncated, trained):
    config = settings(1, dynamic_sampling=False)
    config.reward.truncated = truncated
    found = sampler(judge, [WRONG], config).groups(1)
    assert [sum(r.mask()) for r in found.groups[0].responses] == [trained] * N
    assert found.statistics["correct_rate"] == 0.0 and found.statistics["response_length"] == 5


def test_penalties_follow_the_settings(judge):
    config = settings(1, max_tokens=5)
    config.reward.overlong_buffer = 4
    assert [r.penalty for r in sampler(judge, [MIXED], config).groups(1).groups[0].responses] == [-0.5] * N


def test_kept_correct_rate_is_of_the_kept_groups_alone(judge):
    found = sampler(judge, [MIXED, RIGHT, RIGHT, RIGHT], settings(4, max_prompts_per_step=4)).groups(1)
    assert found.statistics["correct_rate"] == 0.875 and found.statistics["kept_correct_rate"] == 0.5


def test_requests_carry_the_settings(judge):
    engine, config = FakeEngine(N), settings(1, temperature=0.7, top_p=0.9, max_tokens=33)
    sampler(judge, [MIXED], config, engine).groups(2)
    expected = [Request((MIXED, 10), 0.7, 0.9, 33, seed_of(config.seed, 2, "set", "set/0", k)) for k in range(N)]
    assert engine.requests[:N] == expected and engine.slept == 1


def seeds(judge, kinds: list[int], step: int, seed: int = 1, shuffle: bool = False, **rollout) -> dict[int, list[int]]:
    """The seeds that each prompt, known by its second token, was sampled with."""
    engine, config = FakeEngine(N), settings(len(kinds), max_prompts_per_step=len(kinds), **rollout)
    config.seed = seed
    sampler(judge, kinds, config, engine, shuffle).groups(step)
    found: dict[int, list[int]] = {}
    for request in engine.requests:
        found.setdefault(request.token_ids[1], []).append(request.seed)
    return found


def test_seeds_depend_on_run_seed_step_prompt_and_sample_alone(judge):
    found = seeds(judge, [MIXED] * 5, step=3)
    flat = [seed for own in found.values() for seed in own]
    assert len(set(flat)) == 5 * N and all(0 <= seed < 2**63 for seed in flat)
    assert seeds(judge, [MIXED] * 5, 3, shuffle=True) == found  # neither on the place in the step
    assert seeds(judge, [MIXED] * 5, 3, order="started", temperature=0.5) == found  # nor on other settings
    assert seeds(judge, [RIGHT] * 9, 3)[11] == found[11]  # nor on the other prompts
    for other in (seeds(judge, [MIXED] * 5, 4), seeds(judge, [MIXED] * 5, 3, seed=2)):
        assert not set(flat) & {seed for own in other.values() for seed in own}


def test_a_prompt_that_comes_twice_in_a_step_gets_new_answers(judge):
    engine = FakeEngine(N)
    found = sampler(judge, [MIXED], settings(3), engine).groups(1)
    assert positions(found) == [0, 1, 2] and {group.prompt.id for group in found.groups} == {"set/0"}
    assert [request.seed for request in engine.requests[: 3 * N]] == [seed_of(1, 1, "set", "set/0", k) for k in range(3 * N)]


def test_equal_runs_are_equal_and_steps_differ(judge):
    first, second = (sampler(judge, [CHANCE] * 20, settings(4), shuffle=True) for _ in range(2))
    runs = [[s.groups(step) for step in (1, 2)] for s in (first, second)]
    for a, b in zip(*runs):
        assert content(a.groups) == content(b.groups) and a.statistics == b.statistics
    assert content(runs[0][0].groups) != content(runs[0][1].groups)


LAYOUT = {"prompts_sent", "idle_share", "sampled_tokens"}  # of what was sent in vain, too, and that depends on the engines


@pytest.mark.parametrize("ranks, tp, slots", [(2, 1, 1000), (3, 1, 8), (4, 1, 4), (2, 2, 12), (4, 2, 1000)])
def test_the_number_of_engines_changes_nothing(judge, ranks, tp, slots):
    """The groups of all ranks together are those of one engine, each on one rank; every rank has the same numbers and warnings."""
    kinds, config = [CHANCE, RIGHT, CHANCE, WRONG, CHANCE, WRONG, RIGHT], settings(5, per_update=2, max_prompts_per_step=20)
    config.data.most_skipped = 0.9
    alone = sampler(judge, kinds, config, FakeEngine(N, length=some_length), shuffle=True)
    single = [alone.groups(step) for step in (1, 2, 3)]
    assert any(rollout.statistics["prompts_skipped"] for rollout in single)

    def run(engine: FakeEngine) -> list[Rollout]:
        own = sampler(judge if engine.is_first else None, kinds, config, engine, shuffle=True)
        return [own.groups(step) for step in (1, 2, 3)]

    everyone = on_ranks(ranks, N, run, tp, slots=slots, length=some_length)
    for step, expected in enumerate(single):
        parts = [rank[step] for rank in everyone]
        assert content([g for part in parts for g in part.groups]) == content(expected.groups)
        for part in parts:
            assert part.statistics == parts[0].statistics and part.warnings == expected.warnings
            assert {name for name, value in part.statistics.items() if value != expected.statistics[name]} <= LAYOUT
        assert len({part.reward_seconds for part in parts}) == 1
        assert all(part.groups == [] for rank, part in enumerate(parts) if rank % tp)
        assert all(positions(part) == sorted(positions(part)) for part in parts)


def some_length(prompt: tuple[int, ...], sample: int) -> int:
    return 1 + (7 * prompt[1] + 3 * sample) % 4


def test_engines_tell_each_other_once_in_some_steps(judge):
    """Sums over all ranks, and the steps of an engine that has nothing to write while the other one has."""

    def run(engine):
        sums, added = [], engine.added
        engine.added = lambda values: sums.append(engine.steps) or added(values)
        sampler(judge, [MIXED], settings(1, max_prompts_per_step=1), engine).groups(1)
        return engine.steps, sums

    (busy, sums), (idle, others) = on_ranks(2, N, run, length=lambda prompt, sample: 60)
    assert (busy, idle) == (60, 0) and len(sums) == len(others) and sums[:8] == [8, 16, 24, 32, 40, 48, 56, 60]


def test_an_engine_without_prompts_takes_part(judge):
    """Three engines, one prompt: two have nothing to do and must still run along."""
    parts = on_ranks(3, N, lambda engine: sampler(judge, [MIXED], settings(1), engine).groups(1))
    assert [len(part.groups) for part in parts] == [1, 0, 0] and parts[0].statistics == parts[2].statistics


class SlowJudge:
    """Verdicts that are ready 0.2 s after they were asked for."""

    def submit(self, text: str, prompt) -> Future:
        future = Future()
        threading.Timer(0.2, future.set_result, [Verdict(float("1" in text), "right" if "1" in text else "wrong")]).start()
        return future


def test_reward_seconds_is_the_longest_wait_of_the_engines(judge):
    begin = time.perf_counter()
    parts = on_ranks(2, N, lambda e: sampler(SlowJudge() if e.index else judge, [MIXED] * 2, settings(2), e).groups(1))
    assert parts[0].reward_seconds == parts[1].reward_seconds
    assert 0.1 < parts[0].reward_seconds < time.perf_counter() - begin


def test_answer_keeps_order_and_reports_each_answer(judge):
    """Prompts with unequal numbers of requests; answers finish last to first."""
    prompts, finished = [fake_prompt(RIGHT, 0), fake_prompt(WRONG, 1), fake_prompt(RIGHT, 2)], []
    requests = [[Request(p.token_ids, 1.0, 1.0, 8, seed) for seed in range(k)] for p, k in zip(prompts, (2, 0, 1))]
    groups = answer(FakeEngine(N), judge, prompts, requests, lambda index, response: finished.append((index, response.text)))
    assert [(g.prompt, len(g.responses)) for g in groups] == list(zip(prompts, (2, 0, 1)))
    assert [r.verdict.score for g in groups for r in g.responses] == [1.0, 1.0, 1.0]
    assert finished == [(index, "\\boxed{1}") for index in (2, 1, 0)]


def test_sync_hands_on_the_stream_and_its_version(judge):
    engine = FakeEngine(N)
    own = sampler(judge, [MIXED], settings(1), engine)
    own.sync(iter([one_bucket([("a", 1), ("b", 2)])]), version=7)
    assert engine.weights == {"a": 1, "b": 2}
    assert {r.weight_version for r in own.groups(1).groups[0].responses} == {7}

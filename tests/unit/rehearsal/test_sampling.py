"""The queue with simulated engines: against what the draw says, counted one by one, and against the planner's own simulation."""

import numpy as np
import pytest

from megatron_nft import config
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.models import find
from megatron_nft.rehearsal.sampling import _Run, sample

CONFIG = """
run_dir: run
preset: nft-7b
model: {path: Qwen2.5-1.5B}
plan: {nodes: 1, mean_response_length: 60}
rollout: {prompts_per_step: 8, n: 4, tensor_parallel_size: 4, max_tokens: 200, max_num_seqs: 16}
train: {prompts_per_update: 4}
"""
MANY = 10**6  # tokens of a cache that is never full


@pytest.fixture
def load(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return lambda *overrides: config.load(tmp_path / "config.yaml", list(overrides))


def sampled(settings, kv_tokens=MANY):
    return sample(settings, find("Qwen2.5-1.5B").hf, Cluster.of(settings), kv_tokens)


def test_all_answers_at_once_take_as_many_steps_as_the_longest(load):
    """Without dynamic sampling: what was sent is what was drawn, and nothing else."""
    settings = load("rollout.dynamic_sampling=false")
    found = sampled(settings)
    run = _Run(settings, Engine.of(settings, find("Qwen2.5-1.5B").hf, Cluster.of(settings), MANY), 2)
    lengths = np.array([run._draw(key)[0] for key in range(8)])
    assert (found.sent, len(found.groups), found.enough) == (8, 8, True)
    assert found.tokens == lengths.sum()
    assert found.steps == lengths.max()  # 32 places for 32 answers
    assert [len(r.token_ids) for group in found.groups for r in group.responses] == lengths.ravel().tolist()
    assert found.reread == 8 * 4 * 150 and found.preempted == 0


def test_time_is_the_sum_of_scheduler_steps(load):
    """One answer at a time on one engine: each token costs what the planner's engine says for its context."""
    settings = load("rollout.dynamic_sampling=false", "rollout.prompts_per_step=1", "train.prompts_per_update=1", "rollout.n=2",
                    "rollout.tensor_parallel_size=8")  # fmt: skip
    cluster, hf = Cluster.of(settings), find("Qwen2.5-1.5B").hf
    engine = Engine.of(settings, hf, cluster, MANY)
    short, long = sorted(len(r.token_ids) for r in sampled(settings).groups[0].responses)
    running = np.array([2] * short + [1] * (long - short), float)
    context = np.array([2 * (150 + t) for t in range(short)] + [150 + t for t in range(short, long)], float)
    reading = float(
        engine.seconds(np.array([2.0]), np.array([300.0]), np.array([300.0])) - engine.seconds(np.array([2.0]), np.array([300.0]))
    )
    assert sampled(settings).seconds == pytest.approx(engine.seconds(running, context).sum() + reading, rel=1e-3)


def test_kept_groups_are_the_first_mixed_ones(load):
    found = sampled(load())
    positions = [group.position for group in found.groups]
    assert len(found.groups) == 8 and positions == sorted(positions)
    assert all(group.is_mixed for group in found.groups)
    assert found.sent > 8


def test_a_full_cache_costs_time_and_loses_nothing(load):
    settings = load("rollout.dynamic_sampling=false")
    free, full = sampled(settings), sampled(settings, kv_tokens=900)
    assert full.preempted > 0 and full.reread > free.reread
    assert full.seconds > free.seconds
    assert [len(r.token_ids) for g in full.groups for r in g.responses] == [len(r.token_ids) for g in free.groups for r in g.responses]


def test_carried_answers_go_on(load):
    settings = load("rollout.order=started", "rollout.max_staleness=1")
    found = sampled(settings)
    assert found.enough and len(found.groups) == 8
    assert all(len(group.responses) == 4 and all(0 < len(r.token_ids) <= 200 for r in group.responses) for group in found.groups)


def test_the_same_each_time(load):
    one, two = sampled(load()), sampled(load())
    assert (one.seconds, one.tokens, one.sent) == (two.seconds, two.tokens, two.sent)


def test_the_share_of_mixed_groups_is_the_settings(load):
    settings = load("plan.mixed_share=0.3", "plan.mean_response_length=150")  # many answers are cut off, and wrong
    run = _Run(settings, Engine.of(settings, find("Qwen2.5-1.5B").hf, Cluster.of(settings), MANY), 2)
    drawn = [run._draw(key) for key in range(2000)]
    mixed = np.mean([len(set(scores)) == 2 for _, scores in drawn])
    assert mixed == pytest.approx(0.3, abs=0.04)
    assert not any(score for lengths, scores in drawn for length, score in zip(lengths, scores) if length == 200)

"""Layouts that cannot be: said before anything is started."""

import dataclasses
import os
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_nft.config import ParallelConfig
from megatron_nft.errors import UserError
from megatron_nft.policy import topology
from megatron_nft.sizes import check_ranks


@pytest.mark.parametrize("tp, pp, worlds", [(1, 1, (1, 3, 8)), (2, 1, (2, 6)), (1, 2, (2, 4)), (2, 2, (4, 8)), (4, 3, (12, 24))])
def test_worlds_that_divide(tp, pp, worlds):
    for world in worlds:
        check_ranks(ParallelConfig(tp, pp), world)


@pytest.mark.parametrize("tp, pp, world", [(2, 1, 1), (1, 2, 3), (2, 2, 2), (2, 2, 6), (4, 3, 8)])
def test_worlds_that_do_not_divide(tp, pp, world):
    with pytest.raises(UserError) as caught:
        check_ranks(ParallelConfig(tp, pp), world)
    assert f"world size {world} " in caught.value.problem and f"({tp} x {pp})" in caught.value.problem
    assert f"multiple of {tp * pp} ranks" in caught.value.mend


def test_sequence_parallel_needs_tensor_parallel():
    check_ranks(ParallelConfig(2, 1, sequence_parallel=True), 2)
    with pytest.raises(UserError, match="sequence_parallel"):
        check_ranks(ParallelConfig(1, 2, sequence_parallel=True), 2)


@pytest.mark.parametrize(
    ("sizes", "world", "problem"),
    [
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2}, 6, r"world size 6 .* x context_parallel_size \(2 x 1 x 2\)"),
        ({"virtual_pipeline_model_parallel_size": 2}, 4, "virtual_pipeline_model_parallel_size is set with pipeline_model_parallel_size 1"),
        ({"expert_model_parallel_size": 4}, 6, r"world size 6 .* x expert_model_parallel_size .* \(1 x 4 x 1\)"),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, 6, r"world size 6 .* \(2 x 2 x 1\)"),
        ({"expert_tensor_parallel_size": 2}, 4, "expert_tensor_parallel_size is 2 with tensor_model_parallel_size 1"),
    ],
)
def test_context_virtual_stages_and_experts(sizes, world, problem):
    with pytest.raises(UserError, match=problem):
        check_ranks(ParallelConfig(**sizes), world)


def test_what_batching_rounds_up():
    plain, mixed = place(0, 1, 2, 2), dataclasses.replace(place(0, 1, 2, 2), context_size=4, virtual_size=2)
    assert (plain.sequence_multiple, plain.micro_batch_multiple) == (1, 1)
    assert (mixed.sequence_multiple, mixed.micro_batch_multiple) == (8, 2)


@pytest.mark.parametrize("given", ["x", "0", "-1", ""])
def test_a_world_size_that_is_none(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(UserError, match="WORLD_SIZE is"):
        topology.world_size()


def test_world_size_is_the_launchers(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert topology.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert topology.world_size() == 16


def place(rank: int, tp: int, pp: int, dp: int) -> topology.Topology:
    world = tp * pp * dp
    return topology.Topology(
        rank, world, rank % tp, tp, rank // (tp * dp), pp, rank // tp % dp, dp, tuple(r // tp % dp for r in range(world))
    )


def test_first_rank_and_last_stage():
    places = [place(rank, tp=2, pp=2, dp=2) for rank in range(8)]
    assert [p.is_first for p in places] == [True] + [False] * 7
    assert [p.is_last_stage for p in places] == [False] * 4 + [True] * 4
    assert place(0, 1, 1, 1).is_last_stage


def test_a_world_of_one_leaves_the_environment_as_it_was():
    """A program started after it is no rank of it (it would wait for, or fight over, its port)."""
    before = dict(os.environ)
    topology.start_distributed()
    assert dist.get_world_size() == 1 and os.environ["WORLD_SIZE"] == "1"
    topology.shutdown()
    assert not dist.is_initialized() and dict(os.environ) == before


def test_the_world_waits_as_long_as_the_watchdog_has_it(monkeypatch):
    waits = []
    monkeypatch.setattr(topology.watchdog, "patience", lambda: timedelta(minutes=90))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: waits.append((backend, timeout)))
    topology.start_distributed()
    topology.shutdown()
    assert waits == [("gloo", timedelta(minutes=90))]

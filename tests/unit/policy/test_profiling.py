"""Traces: of the steps, ranks and stages that were asked for, with the stages' names in them; nothing where none was."""

import gzip
import json

import pytest
import torch

from megatron_nft.config.settings import Config, ModelConfig, ProfileConfig
from megatron_nft.errors import UserError
from megatron_nft.policy import profiling
from megatron_nft.policy.profiling import Profiler, check_profiled_ranks


def config(run_dir, **settings) -> Config:
    return Config(run_dir=str(run_dir), model=ModelConfig(path="m"), profile=ProfileConfig(**settings))


def run(profiler: Profiler, steps: int) -> None:
    for step in range(1, steps + 1):
        with profiler.step(step):
            for stage in ("generate", "train"):
                with profiler.stage(stage):
                    torch.ones(8, 8) @ torch.ones(8, 8)


def names(path) -> set[str]:
    return {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def files(run_dir) -> list[str]:
    return sorted(path.name for path in run_dir.glob("profile/*"))


def test_whole_steps(tmp_path):
    run(Profiler(config(tmp_path, steps=[2, 3], ranks=[1]), rank=1), steps=3)
    assert files(tmp_path) == ["step_2-rank1.json.gz", "step_3-rank1.json.gz"]
    assert {"generate", "train", "aten::mm"} <= names(tmp_path / "profile" / "step_2-rank1.json.gz")


def test_one_stage(tmp_path):
    run(Profiler(config(tmp_path, steps=[1], stages=["train"]), rank=0), steps=2)
    assert files(tmp_path) == ["step_1-rank0-train.json.gz"]
    found = names(tmp_path / "profile" / "step_1-rank0-train.json.gz")
    assert {"train", "aten::mm"} <= found and "generate" not in found


@pytest.mark.parametrize("settings", [{"steps": []}, {"steps": [1], "ranks": [1]}], ids=["no step", "another rank"])
def test_where_nothing_is_traced_no_profiler_is_made(settings, tmp_path, monkeypatch):
    def none(**_):
        raise AssertionError("a profiler was made")

    monkeypatch.setattr(profiling, "profile", none)
    monkeypatch.setattr(profiling, "record_function", none)
    run(Profiler(config(tmp_path, **settings), rank=0), steps=2)
    assert files(tmp_path) == []


def test_a_step_that_fails_leaves_no_trace_and_the_next_one_is_whole(tmp_path):
    profiler = Profiler(config(tmp_path, steps=[1, 2]), rank=0)
    with pytest.raises(ValueError, match="broken"), profiler.step(1), profiler.stage("train"):
        raise ValueError("broken")
    assert files(tmp_path) == []
    run(profiler, steps=2)
    assert files(tmp_path) == ["step_1-rank0.json.gz", "step_2-rank0.json.gz"]


def test_a_rank_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_profiled_ranks(config(tmp_path, steps=[1], ranks=[3]))
    check_profiled_ranks(config(tmp_path, ranks=[4]))  # no step, no trace
    with pytest.raises(UserError, match="profile.ranks has 4, and this run has 4 ranks, from 0 on: leave it out"):
        check_profiled_ranks(config(tmp_path, steps=[1], ranks=[0, 4]))

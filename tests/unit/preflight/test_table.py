"""The table of a run that may begin, its warnings, and the shapes that are refused."""

import math
import shutil

import pytest
from safetensors import safe_open

from megatron_nft.config import load
from megatron_nft.errors import UserError
from megatron_nft.policy.devices import Exchange
from megatron_nft.preflight import check_shape
from megatron_nft.preflight.table import Found, table, warnings
from megatron_nft.preflight.together import Place
from tests.support import ROOT

GIB = 2**30
MODEL = ROOT / "examples/arithmetic/model"


@pytest.fixture
def found(tmp_path):
    """Two nodes of two GPUs, with nothing to complain of; what is given goes over it."""

    def make(*overrides: str, **changes: object) -> Found:
        settings = load(ROOT / "examples/arithmetic/nft.yaml", [f"run_dir={tmp_path}", f"model.path={MODEL}", *overrides])
        ranks = [Place(rank, f"node{1 + rank // 2}") for rank in range(4)]
        given = {"settings": settings, "ranks": ranks, "trainers": 4, "versions": {"torch": "2.13", "transformer-engine": ""},
                 "gpus": ["H100", "H100"], "files": ["model.path"], "run_dir": "new", "fits": "", "cpus": [16, 8, 16, 16],
                 "shared_memory": 900 * GIB, "exchange": Exchange("nccl", 2**28, 3e11)}  # fmt: skip
        return Found(**given | changes)

    return make


def test_the_table(found, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1024 * GIB))
    assert table(found("parallel.tensor_model_parallel_size=2")).splitlines() == [
        "ranks       4 on node1, node2",
        "versions    torch 2.13, transformer-engine none; the same on all ranks",
        "GPUs        2 x H100 on each node",
        "layout      TP2 PP1 CP1 DP2; vLLM: 4 x TP1",
        "files       model.path; the same on all nodes",
        f"run_dir     {tmp_path}: new; the same on all nodes",
        "CPUs        8 of a rank, or more",
        "room        1,024 GiB in run_dir, 900 GiB or more in /dev/shm",
        "all-reduce  256 MiB over nccl: 300.00 GB/s bus bandwidth",
    ]


def test_warnings(found, tmp_path, monkeypatch):
    assert list(warnings(found())) == []
    assert list(warnings(found(exchange=Exchange("gloo", 2**23, 1e6)))) == []  # of a network for which there is no expectation
    slow, few, small = Exchange("nccl", 2**28, 4e10), [3, 8, 8, 8], 2 * GIB
    told = list(warnings(found(exchange=slow, cpus=few, shared_memory=small)))
    assert [line.split()[0] for line in told] == ["a", "/dev/shm", "less"] and "less than 50 GB/s" in told[2]


@pytest.mark.parametrize(("gpus", "bytes_each"), [(["H100", "H100"], 14), ([], 16)])
def test_room_for_checkpoints(found, gpus, bytes_each, monkeypatch):
    """Two are kept, the best, and one is being written: weights in the run's precision, fp32 weights and two moments of each parameter."""
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    needed = 4 * parameters * bytes_each
    for free, warned in ((1.03 * needed, 0), (0.99 * needed, 1)):  # the vocabulary is padded
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        told = list(warnings(found("checkpoint.keep_best=1", gpus=gpus)))
        assert len(told) == warned and all("; 4 checkpoints, one of them being written" in line for line in told)


def test_shapes(found):
    def check(*overrides: str, trainers: int = 4, ranks: int = 4) -> None:
        check_shape(found(*overrides).settings, trainers, ranks, on_gpus=True)

    check("parallel.tensor_model_parallel_size=2", "rollout.tensor_parallel_size=4", "plan.nodes=2", "plan.gpus_per_node=2")
    check("rollout.tensor_parallel_size=4", "rollout.mode=served", trainers=2, ranks=6)
    with pytest.raises(UserError, match="world size 4 is not divisible by tensor_model_parallel_size x pipeline_model_parallel_size"):
        check("parallel.pipeline_model_parallel_size=3")
    with pytest.raises(UserError, match=r"rollout.tensor_parallel_size \(3\) does not divide the number of processes \(4\)"):
        check("rollout.tensor_parallel_size=3")
    for trainers in (0, 5):
        with pytest.raises(UserError, match=rf"{trainers} of 4 ranks are to train \(--trainers\)"):
            check(trainers=trainers)
    with pytest.raises(UserError, match="plan.gpu is 'H900': use one of"):
        check("plan.gpu=H900")
    with pytest.raises(UserError, match=r"4 ranks were started, the config is planned for 16 nodes of 8 GPUs \(plan.nodes\)"):
        check("plan.nodes=16")

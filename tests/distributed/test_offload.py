"""Parameters, gradients and optimizer state leave the device and come back bit for bit; on the CPU by the same code."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_nft.config import Config
from megatron_nft.config.settings import TrainConfig
from megatron_nft.policy import Policy
from megatron_nft.policy.offload import LEVELS, Offload
from tests.distributed.test_layouts import CONFIG
from tests.end_to_end.runs import checkpoint_entries, differences
from tests.support import run_ranks, tiny_model

WORKER = Path(__file__).with_name("offload_worker.py")


def run(tmp_path: Path, model: Path, ranks: int, *overrides: str, save: bool = False) -> dict:
    config, output = tmp_path / "config.yaml", tmp_path / "out.pt"
    config.write_text(CONFIG.replace("unset", str(model)))
    run_ranks(WORKER, ranks, {"config": str(config), "overrides": list(overrides), "output": str(output), "save": save}, tmp_path)
    return torch.load(output)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("precision", "ranks"), [("bf16", 1), ("fp32", 1), ("bf16", 2)])
def test_updates_are_the_same_to_the_last_bit(precision, ranks, model, tmp_path):
    """bf16: the optimizer's float32 copies are tensors of their own; fp32: views of the parameters."""
    overrides = [f"model.precision={precision}", "optimizer.lr=1e-3", *(["parallel.overlap_param_gather=true"] if ranks > 1 else [])]
    plain, moved = (run(tmp_path, model, ranks, *overrides, f"train.offload={level}", save=ranks == 2) for level in ("none", "all"))
    assert moved["updates"] == plain["updates"] and moved["old"] == plain["old"]
    assert plain["before"].keys() == moved["after"].keys() == plain["after"].keys()
    for name, tensor in plain["after"].items():
        assert torch.equal(moved["after"][name], tensor), name
    if ranks == 2:  # a checkpoint has all of it, wherever it is
        assert not differences(*(checkpoint_entries(tmp_path / f"out.{level}") for level in ("none", "all")))
    assert all(min(sizes) > 0 for sizes in plain["left"]) and moved["left"] == [[0, 0, 0]] * 4


def test_gradients_are_freed_and_never_copied():
    """They leave a GPU by default, since that costs nothing: no byte of them goes to the host, and they come back as zeros.
    Copies in FP8 are given up."""
    gradients, parameters = torch.ones(5), torch.ones(3)
    buffer = SimpleNamespace(grad_data=gradients, param_data=parameters)
    linear, norm = SimpleNamespace(_fp8_workspaces={"weight": torch.ones(3)}), SimpleNamespace()
    offload = Offload([SimpleNamespace(buffers=[buffer], expert_parallel_buffers=[], modules=lambda: [linear, norm])], None)
    offload.leave(())
    assert linear._fp8_workspaces
    offload.leave(LEVELS["all"])
    assert not linear._fp8_workspaces  # Transformer Engine's copies in FP8
    assert [kind for kind, _ in offload._host] == ["parameters"]
    assert gradients.untyped_storage().nbytes() == parameters.untyped_storage().nbytes() == 0
    offload.come_back()
    assert gradients.tolist() == [0.0] * 5 and parameters.tolist() == [1.0] * 3


@pytest.mark.parametrize(("setting", "on_gpu", "leaves"), [(None, True, "gradients"), (None, False, "none"), ("all", False, "all")])
def test_the_default(setting, on_gpu, leaves, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    model = Policy.__new__(Policy)
    model.config = Config(train=TrainConfig(offload=setting))
    assert model._leaving == LEVELS[leaves] and model.returns_to_be_saved == (leaves == "all")


@pytest.mark.parametrize(("level", "stay"), [("gradients", [False, True, True]), ("optimizer", [False, True, False])])
def test_what_stays(level, stay, model, tmp_path):
    got = run(tmp_path, model, 1, "model.precision=bf16", f"train.offload={level}")
    assert [[size > 0 for size in sizes] for sizes in got["left"]] == [stay] * 4

"""precision fp16: loss scale, skipped updates, and the scale through a checkpoint."""

from pathlib import Path

import pytest
import torch

from megatron_nft import objectives
from tests.distributed.test_layouts import CONFIG
from tests.distributed.test_offload import run as run_float32
from tests.support import run_ranks, tiny_model

WORKER = Path(__file__).with_name("fp16_worker.py")


def run(tmp_path: Path, model: Path, ranks: int, *overrides: str) -> dict:
    config, output = tmp_path / "config.yaml", tmp_path / "out.pt"
    config.write_text(CONFIG.replace("unset", str(model)))
    run_ranks(WORKER, ranks, {"config": str(config), "overrides": ["model.precision=fp16", *overrides], "output": str(output)}, tmp_path)
    return torch.load(output)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_an_update_is_near_the_float32_one(model, tmp_path):
    """float16 has 11 bits of mantissa: loss and gradient norm to 2 % after the four layers."""
    got, reference = run(tmp_path, model, 2, "optimizer.initial_loss_scale=256"), run_float32(tmp_path, model, 1)
    for mine, theirs in zip(got["updates"], reference["updates"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=2e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
        assert mine["loss_scale"] == 256.0
    assert all(tensor.dtype == torch.float16 for tensor in got["parameters"][0].values())
    assert objectives.summarize(got["updates"], clip_grad=1.0)["skipped_updates"] == 0


def test_an_overflow_is_skipped_counted_and_halves_the_scale(model, tmp_path):
    got = run(tmp_path, model, 1, "optimizer.initial_loss_scale=1099511627776", "optimizer.hysteresis=1", "optimizer.lr_warmup_iters=4")
    first, second = got["updates"]
    assert (first["loss_scale"], second["loss_scale"]) == (2.0**39, 2.0**38)
    assert "grad_norm" not in first and first["lr"] == second["lr"] == 0.25  # the warm-up waits for an update that holds
    summary = objectives.summarize(got["updates"], clip_grad=1.0)
    assert summary["skipped_updates"] == 2 and summary["loss_scale"] == 2.0**38 and "grad_norm" not in summary
    for name, tensor in got["parameters"][0].items():
        assert all(torch.equal(later[name], tensor) for later in got["parameters"][1:]), name
    fresh, saved, loaded = got["scalers"]
    assert float(fresh["scale"]) == 2.0**40 and loaded == saved and float(saved["scale"]) == 2.0**38 and got["warm"] == 0

"""A checkpoint written while training goes on, under one layout, and gone on from under others."""

from pathlib import Path

import pytest
import torch

from tests.distributed.test_layouts import CONFIG as LAYOUTS_CONFIG
from tests.support import run_ranks, tiny_model

WORKER = Path(__file__).with_name("checkpoint_worker.py")
CONFIG = LAYOUTS_CONFIG.replace("lr: 1.0, adam_eps: 1.0,", "lr: 1.0e-2, adam_eps: 1.0e-3,")
EXPERTS = ["parallel.expert_model_parallel_size=2"]
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SAVED_AS = {"PP2": "saved", "TP2": "saved", "DP2": "saved", "one rank": "saved", "experts TP2": "experts EP2"}
LAUNCHES = {
    4: [
        {"name": "saved", "overrides": [TP2], "save": "step_1"},
        {"name": "failed", "overrides": [TP2], "save": "failed", "failing": 3},
    ],
    2: [
        {"name": "PP2", "overrides": [PP2], "load": "step_1"},
        {"name": "TP2", "overrides": [TP2], "load": "step_1"},
        {"name": "DP2", "overrides": [], "load": "step_1"},
        {"name": "experts EP2", "overrides": EXPERTS, "save": "experts/step_1"},
        {
            "name": "experts TP2",
            "overrides": [*EXPERTS, TP2, "parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=1"],
            "load": "experts/step_1",
        },
    ],
    1: [{"name": "one rank", "overrides": [], "load": "step_1"}],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(directory) -> dict:
    """What every case found."""
    dense = str(tiny_model(directory / "model", tie=False))
    experts = str(tiny_model(directory / "experts_model", family="qwen3_moe", tie=False))
    (directory / "config.yaml").write_text(CONFIG)
    results: dict = {}
    for ranks, cases in LAUNCHES.items():
        output = directory / f"{ranks}.pt"
        arguments = {"config": str(directory / "config.yaml"), "directory": str(directory), "output": str(output)}
        cases = [case | {"model": experts if "experts" in case["name"] else dense} for case in cases]
        run_ranks(WORKER, ranks, arguments | {"cases": cases}, directory)
        results |= torch.load(output)
    return results


@pytest.mark.parametrize("layout", SAVED_AS)
def test_equal_parameters_and_moments_bit_for_bit(layout, found):
    saved = found[SAVED_AS[layout]]
    assert saved["saved"] is None and found[layout]["state"] == {"step": 1}
    for kind, tensors in saved["held"].items():
        assert tensors.keys() == found[layout]["held"][kind].keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[layout]["held"][kind][name], tensor), f"{kind} of {name}"
    assert saved["held"]["exp_avg"]["lm_head.weight"].any() and saved["held"]["exp_avg_sq"]["lm_head.weight"].any()


@pytest.mark.parametrize("layout", SAVED_AS)
def test_the_next_update_is_the_same(layout, found):
    """Loss, gradient norm and learning rate: 1e-6 relative."""
    saved = found[SAVED_AS[layout]]
    assert found[layout]["next"] == pytest.approx(saved["next"], rel=1e-6, abs=1e-8)
    assert saved["next"]["grad_norm"] > 1e-3


def test_one_ranks_full_disk_is_known_to_all_and_leaves_nothing(directory, found):
    """The worker compares what the ranks were told."""
    assert found["failed"]["saved"] == "No space left on device (a file)"
    assert sorted(path.name for path in directory.iterdir() if "step" in path.name or "failed" in path.name) == ["step_1"]

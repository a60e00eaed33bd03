"""GPUs, drivers and builds of torch that do not go together, by stand-ins for what torch tells of them."""

from types import SimpleNamespace

import pytest
import torch

from megatron_nft.errors import UserError, gpus_elsewhere
from megatron_nft.policy import machine

HOPPER, AMPERE, ADA, BLACKWELL, CONSUMER = (9, 0), (8, 0), (8, 9), (10, 0), (12, 0)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading and installing a new "
    "version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to install a PyTorch version"
)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A torch for CUDA 13.0 on a machine with a driver; what is told of it."""

    def make(available=True, chip=HOPPER, gpus=8, codes=("sm_80", "sm_90"), init="No CUDA GPUs are available", driver=True, cuda="13.0"):
        file = tmp_path / "version"
        file.write_text("NVRM")
        monkeypatch.setattr(machine, "DRIVER", file if driver else tmp_path / "nowhere")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(codes))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(major=chip[0], minor=chip[1]))
        monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(init)))

    monkeypatch.delenv(machine.VISIBLE, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return make


def refused() -> str:
    with pytest.raises(UserError) as caught:
        machine.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_goes_together_passes(built, monkeypatch):
    built()
    machine.check()
    built(available=False, driver=False)  # a login node
    machine.check()
    built(available=False, cuda=None)  # a build for the CPU
    machine.check()
    monkeypatch.setenv(machine.VISIBLE, "-1")
    built(available=False)  # no GPU on purpose
    machine.check()


def test_a_driver_older_than_the_build(built):
    built(available=False, init=TOO_OLD)
    said = refused()
    assert said.startswith("the NVIDIA driver is for CUDA 12.4, older than what torch 2.11.0+cu130, built for CUDA 13.0, needs: update the")
    assert "a torch built for CUDA 12.4 or earlier" in said and "http" not in said


def test_a_driver_that_does_not_answer(built):
    built(available=False, init="CUDA driver initialization failed, you might not have a CUDA gpu.\nmore")
    assert "cannot use its GPUs: CUDA driver initialization failed" in refused()


@pytest.mark.parametrize("value", ["", "NoDevFiles"])
def test_no_gpu_visible_on_a_machine_with_gpus(value, built, monkeypatch):
    built(available=False)
    monkeypatch.setenv(machine.VISIBLE, value)
    said = refused()
    assert f"CUDA_VISIBLE_DEVICES is {value!r} on a machine with GPUs" in said and "CUDA_VISIBLE_DEVICES=-1 goes on" in said


def test_hidden_gpus_are_noted_of_a_run_that_is_only_looked_at(built, monkeypatch):
    built(available=False)
    monkeypatch.setenv(machine.VISIBLE, "")
    with gpus_elsewhere() as noted:
        machine.check()
    assert len(noted) == 1 and "so that none is to be seen" in noted[0]
    built(available=False, init=TOO_OLD)
    monkeypatch.delenv(machine.VISIBLE)
    with gpus_elsewhere(), pytest.raises(UserError, match="older than"):
        machine.check()


def test_more_ranks_than_gpus(built, monkeypatch):
    built(gpus=2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv(machine.VISIBLE, "0,1")
    assert refused().startswith("local rank 2 has no GPU: 2 are to be seen (CUDA_VISIBLE_DEVICES=0,1)")


def test_a_torch_without_the_chips_code(built):
    built(chip=BLACKWELL)
    said = refused()
    assert "has no code for GPU 0 (NVIDIA H100, sm_100): it was built for sm_80 sm_90: install a torch that is built for sm_100" in said


@pytest.mark.parametrize(
    ("chip", "codes", "runs"),
    [
        (HOPPER, ["sm_90"], True),
        (ADA, ["sm_80"], True),  # within a major number
        (AMPERE, ["sm_86"], False),
        (BLACKWELL, ["sm_90"], False),
        (BLACKWELL, ["sm_90", "compute_90"], True),  # PTX is compiled for what comes later
        (HOPPER, ["compute_100"], False),
        (HOPPER, ["sm_90a"], True),
        (BLACKWELL, ["sm_90", "compute_90a"], False),  # of that chip alone
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        (CONSUMER, ["sm_100f"], False),
        (HOPPER, [], True),
    ],
)
def test_which_code_runs_on_which_chip(chip, codes, runs):
    assert machine.has_code(chip, codes) == runs


@pytest.mark.parametrize(
    ("recipe", "chip", "cuda", "fault"),
    [
        ("tensorwise", HOPPER, "13.0", ""),
        ("delayed", ADA, "12.4", ""),
        ("tensorwise", AMPERE, "13.0", "compute capability 8.0) lacks it: it needs 8.9 or higher"),
        ("blockwise", HOPPER, "12.9", ""),
        ("blockwise", HOPPER, "12.8", "it needs CUDA 12.9 or later, and torch 2.11.0+cu130 is built for 12.8"),
        ("blockwise", ADA, "13.0", "it needs 9.0 or higher"),
        ("mxfp8", BLACKWELL, "13.0", ""),
        ("mxfp8", HOPPER, "13.0", "it needs 10.0 or higher"),
        ("mxfp8", CONSUMER, "13.0", "below 12.0 only"),
    ],
)
def test_fp8_recipes_of_chips(recipe, chip, cuda, fault, built):
    built(chip=chip, cuda=cuda)
    assert fault in machine.fp8_fault(recipe) and bool(fault) == bool(machine.fp8_fault(recipe))


def test_a_recipe_that_the_chip_lacks_is_refused_with_one_that_it_has(built):
    built(chip=HOPPER)
    with pytest.raises(UserError, match="model.fp8_recipe is mxfp8, and NVIDIA H100 .*: set model.fp8_recipe=tensorwise"):
        machine.check_fp8("mxfp8")
    built(chip=AMPERE)
    with pytest.raises(UserError, match="set model.fp8=null"):
        machine.check_fp8("delayed")

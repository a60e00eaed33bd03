"""A vLLM that does not go with this torch: packages that stand in for it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_nft.config import RolloutConfig
from megatron_nft.errors import UserError
from megatron_nft.rollout import arguments, installed


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """A package of that name before the real one, with a compiled part."""

    def make(code: str = "", part: str = "") -> None:
        folder = tmp_path / "vllm"
        folder.mkdir()
        (folder / "__init__.py").write_text(code)
        (folder / "_C.py").write_text(part)
        (folder / "_C.cpython-39.so").write_text("")  # no file of this Python: what is imported is the one above
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(sys, "path_importer_cache", {})

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "vllm" or name.startswith("vllm.")}
    yield make
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    sys.modules.update(kept)


UNDEFINED = "/site/vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDevice"


@pytest.mark.parametrize("where", ["code", "part"])
def test_one_for_another_torch_is_refused(where, vllm, monkeypatch):
    vllm(**{where: f"raise ImportError({UNDEFINED!r})"})
    found = SimpleNamespace(version="0.26.0", requires=["torch==2.11.0; platform_machine == 'x86_64'", "torchvision"])
    monkeypatch.setattr(installed, "_distribution", lambda: found)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    with pytest.raises(UserError) as caught:
        installed.check(RolloutConfig())
    assert caught.value.problem == f"vLLM 0.26.0 does not load with torch 2.13.0 ({UNDEFINED})"
    assert caught.value.mend == "install the vLLM that is built for this torch and its CUDA, or the torch that it wants (torch==2.11.0)"


def test_one_that_loads_passes(vllm):
    vllm()
    installed.check(RolloutConfig())
    assert "vllm._C" in sys.modules


def test_none_is_refused_with_and_without_a_gpu(monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="vLLM, which writes the answers, is not installed: install it"):
        installed.check(RolloutConfig())


@pytest.mark.parametrize(
    ("settings", "chip", "said"),
    [
        ({"quantization": "fp8"}, (7, 0), "rollout.quantization is fp8, which vLLM has from compute capability 7.5 on; this GPU's is 7.0"),
        ({"kv_cache_dtype": "fp8"}, (8, 0), "rollout.kv_cache_dtype is fp8, and vLLM's attention"),
        ({"quantization": "fp9"}, (9, 0), "rollout.quantization is fp9: Invalid quantization method: fp9"),
    ],
)
def test_fp8_that_the_gpu_has_not_for_vllm(settings, chip, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: chip)
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)  # no FlashInfer
    with pytest.raises(UserError) as caught:
        arguments._check_fp8(RolloutConfig(**settings))
    assert caught.value.problem.startswith(said)


def test_fp8_that_the_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    arguments._check_fp8(RolloutConfig(quantization="fp8", kv_cache_dtype="fp8"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 0))
    arguments._check_fp8(RolloutConfig(quantization="fp8"))  # kernels for older chips widen the weights

"""Quantised weights of an engine are compared by a product: rounding is let pass, another tensor is not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_nft.rollout.loaded import differs

RANGE = torch.finfo(torch.float8_e4m3fn).max


class Quantised(nn.Module):
    """A linear layer as vLLM's online FP8 leaves it: the weight [in, out] in FP8 with one scale; activations are quantised, too."""

    def __init__(self, parts: list[torch.Tensor]):
        super().__init__()
        full = torch.cat(parts)
        self.scale = full.abs().max() / RANGE
        self.weight = nn.Parameter((full / self.scale).to(torch.float8_e4m3fn).t(), requires_grad=False)
        self.output_partition_sizes, self.input_size_per_partition = [len(part) for part in parts], full.shape[1]
        self.quant_method = SimpleNamespace(apply=self.apply_to)

    def apply_to(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / RANGE
        return ((x / scale).to(torch.float8_e4m3fn).float() @ self.weight.float() * scale * self.scale).to(x.dtype)


def weight(seed: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def model() -> nn.Module:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.qkv_proj = Quantised([weight(0, 64), weight(1, 32), weight(2, 32)])
    model.layer.o_proj = Quantised([weight(3, 64)])
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return model


@pytest.mark.parametrize(("name", "seed", "rows"), [("q_proj", 0, 64), ("k_proj", 1, 32), ("v_proj", 2, 32), ("o_proj", 3, 64)])
def test_its_own_tensor_and_another(model, name, seed, rows):
    assert not differs(model, f"layer.{name}.weight", weight(seed, rows))
    assert differs(model, f"layer.{name}.weight", weight(seed + 10, rows))
    assert differs(model, f"layer.{name}.weight", weight(seed, rows) * 1.5)
    assert differs(model, f"layer.{name}.weight", weight(seed, rows) * float("nan"))

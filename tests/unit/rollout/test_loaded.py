"""Quantised weights of an engine are compared by a product: rounding is let pass, another tensor is not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_nft.checksums import bit_sum
from megatron_nft.rollout import loaded
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


def test_experts_are_summed_over_all_engines_and_the_rest_over_one(monkeypatch):
    """Two engines of two ranks: each rank has half of what its engine has, and a quarter of the experts."""
    monkeypatch.setattr(loaded, "_ranks", lambda of_experts: 4 if of_experts else 2)
    monkeypatch.setattr(loaded, "_rank", lambda: 0)
    monkeypatch.setattr(loaded.dist, "all_reduce", lambda totals, group: totals.mul_(group))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].mlp, model.norm = nn.Module(), nn.Module()
    model.layers[0].mlp.experts = nn.Module()
    for kind in ("w13", "w2"):
        model.layers[0].mlp.experts.register_parameter(f"{kind}_weight", nn.Parameter(weight(1, 4), requires_grad=False))
    model.norm.weight = nn.Parameter(weight(2, 1), requires_grad=False)
    experts = [f"layers.0.mlp.experts.{n}.{part}.weight" for n in range(2) for part in ("gate_proj", "up_proj", "down_proj")]
    found = loaded.checksums(model, ["norm.weight", *experts])
    sums = {len(held): one.total for held, one in found.items() if "norm.weight" not in held}
    assert sums == {4: 4 * int(bit_sum(weight(1, 4))), 2: 4 * int(bit_sum(weight(1, 4)))}
    assert found[frozenset(["norm.weight"])].total == 2 * int(bit_sum(weight(2, 1)))

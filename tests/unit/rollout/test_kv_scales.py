"""Scales of an FP8 cache: of what a layer was given, renewed each time, on a model that has vLLM's places for them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_nft.errors import UserError
from megatron_nft.rollout.kv_scales import HEADROOM, RANGE, Measuring

REAL = SimpleNamespace(num_actual_tokens=3)


class Impl:
    """An attention back end's."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None):
        return query + layer._k_scale


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.impl = Impl()
        for kind in ("k", "v"):
            self.register_buffer(f"_{kind}_scale", torch.tensor(1.0))
            setattr(self, f"_{kind}_scale_float", 1.0)
            setattr(self, f"_{kind}_scale_cpu", torch.tensor(1.0))

    def forward(self, key, value, metadata=REAL):
        return self.impl.forward(self, torch.zeros(1), key, value, None, metadata, output=None)


def model(layers: int = 2) -> nn.Sequential:
    return nn.Sequential(*[Attention() for _ in range(layers)], nn.Linear(2, 2))


def keys(largest: float, padding: float = 0.0) -> torch.Tensor:
    """[tokens, heads, head]: three tokens, and one that is padding."""
    return torch.tensor([1.0, -largest, 0.5, padding], dtype=torch.bfloat16)[:, None, None].expand(4, 2, 8)


def test_scales_are_of_the_largest_value_seen_in_any_pass():
    first, second, _ = layers = model()
    measuring = Measuring(layers)
    assert first(keys(8.0, padding=999.0), keys(2.0)) == 1.0  # the forward pass itself
    first(keys(4.0), keys(16.0))
    second(keys(0.0), keys(32.0), metadata=None)  # a trial run
    second(keys(64.0), keys(2.0))
    measuring.finish()
    for layer, key, value in ((first, 8.0, 16.0), (second, 64.0, 2.0)):
        for kind, largest in (("k", key), ("v", value)):
            wanted = pytest.approx(HEADROOM * largest / RANGE)
            places = [getattr(layer, f"_{kind}_scale{place}") for place in ("", "_float", "_cpu")]
            assert [float(place) for place in places] == [wanted] * 3
            assert largest / float(places[0]) <= RANGE
    assert "forward" not in vars(first.impl)


def test_they_are_renewed_and_nothing_of_before_remains():
    layers = model(1)
    for largest in (100.0, 1.0):
        measuring = Measuring(layers)
        layers[0](keys(largest), keys(largest))
        measuring.finish()
        layers[0](keys(500.0), keys(500.0))  # not looked at
        assert layers[0]._k_scale_float == pytest.approx(HEADROOM * largest / RANGE)


def test_a_layer_that_was_not_seen():
    layers = model()
    measuring = Measuring(layers)
    layers[0](keys(1.0), keys(1.0))
    with pytest.raises(RuntimeError, match="keys and values of 1 attention layers"):
        measuring.finish()
    assert all("forward" not in vars(layer.impl) for layer in layers[:2])


def test_zeros_have_a_scale():
    layers = model(1)
    measuring = Measuring(layers)
    layers[0](torch.zeros(4, 2, 8), torch.zeros(4, 2, 8))
    measuring.finish()
    assert layers[0]._k_scale_float == layers[0]._v_scale_float == 1.0


def test_kernels_that_keep_numbers():
    """FlashInfer's: refused where a graph would keep them, made anew elsewhere."""
    layers = model(1)
    layers[0].impl.bmm1_scale = 0.125
    with pytest.raises(UserError, match="PIECEWISE"):
        Measuring(layers, full_graphs=True)
    measuring = Measuring(layers)
    layers[0](keys(1.0), keys(1.0))
    measuring.finish()
    assert layers[0].impl.bmm1_scale is None

"""Scales of an FP8 key-value cache, measured on prompts. vLLM has none to offer after a reload of weights: it takes them from a
checkpoint's k_scale and v_scale, and 1.0 where there are none.

A scale divides what is stored, so that the largest value fits in what float8_e4m3 can hold. It is of one layer and of one rank. Queries
keep vLLM's 1.0: they are not stored, and a floating-point format needs a scale only for what it cannot hold.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_nft.errors import UserError

DTYPES = ("fp8", "fp8_e4m3")  # the kv_cache_dtypes with such scales: e5m2 has range enough, others scale by token
RANGE = torch.finfo(torch.float8_e4m3fn).max
SEQUENCES = 64  # to measure on
HEADROOM = 2.0  # for values larger than those seen


class Measuring:
    """From its making to `finish` it sees all keys and values that a vLLM model's attention is given. `finish` makes them its scales.

    Attention is a step of its own between compiled pieces, so that this works with CUDA graphs, too, as long as no whole step is one;
    vLLM makes no graph of a step with a prompt in it.
    """

    def __init__(self, model: nn.Module, full_graphs: bool = False):
        """full_graphs: whole decoding steps are CUDA graphs.

        Raises UserError for kernels that would keep their first scale in such a graph.
        """
        self._layers = [layer for layer in model.modules() if hasattr(layer, "_k_scale") and hasattr(layer, "impl")]
        self._largest: list[Tensor | None] = [None] * len(self._layers)  # per layer: [2], of keys and of values
        if full_graphs and any(hasattr(layer.impl, "bmm1_scale") for layer in self._layers):
            raise UserError(
                "rollout.kv_cache_dtype is fp8, and FlashInfer's kernels take its scales as numbers, which a CUDA graph keeps",
                "set rollout.cudagraph_mode=PIECEWISE, or rollout.calculate_kv_scales=false",
            )
        for number, layer in enumerate(self._layers):
            layer.impl.forward = self._seeing(number, layer.impl.forward)

    def _seeing(self, number: int, forward: Any) -> Any:
        def seen(layer, query, key, value, kv_cache, attn_metadata, *arguments, **named):
            if attn_metadata is not None and key is not None:  # None: a trial run of vLLM's
                real = attn_metadata.num_actual_tokens  # what follows is padding
                largest = torch.stack([part[:real].abs().amax().float() for part in (key, value)])
                before = self._largest[number]
                self._largest[number] = largest if before is None else torch.maximum(before, largest)
            return forward(layer, query, key, value, kv_cache, attn_metadata, *arguments, **named)

        return seen

    def finish(self) -> None:
        """Set the scales and look no longer. Raises RuntimeError where a layer was not seen: its scale would be that of other weights."""
        for layer in self._layers:
            del layer.impl.forward  # the class's own is behind it
        if missing := sum(largest is None for largest in self._largest):
            raise RuntimeError(f"the keys and values of {missing} attention layers were not seen: no scales for the FP8 cache")
        for layer, largest in zip(self._layers, self._largest):
            set_scales(layer, *(HEADROOM * largest / RANGE).tolist())


def set_scales(layer: nn.Module, key: float, value: float) -> None:
    """Where vLLM's kernels look for them: on the device, as numbers, and on the host. 0 (nothing seen but zeros) is 1."""
    for kind, scale in (("k", key or 1.0), ("v", value or 1.0)):
        getattr(layer, f"_{kind}_scale").fill_(scale)
        setattr(layer, f"_{kind}_scale_float", scale)
        if hasattr(layer, f"_{kind}_scale_cpu"):
            getattr(layer, f"_{kind}_scale_cpu").fill_(scale)
    for name in ("bmm1_scale", "bmm2_scale"):  # FlashInfer's products of them, made when they are first needed
        if hasattr(layer.impl, name):
            setattr(layer.impl, name, None)

"""Floating-point operations of a training step, counted the usual way: 6 a weight and token, and the attention."""

from megatron_nft.flops import attention_flops, linear_flops

PEAK = {  # dense, operations a second, by a part of the device's name: (bf16, FP8), from the vendor's data sheets
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "H20": (148e12, 296e12),
    "B200": (2250e12, 4500e12),
    "A100": (312e12, None),
}


def training_flops(hf: dict, lengths: list[int]) -> float:
    """Forward and backward, which is twice the forward, over sequences of these lengths, each attending causally to itself; what is
    computed twice counts once. hf: a config.json."""
    return 3 * (linear_flops(hf) * sum(lengths) + attention_flops(hf) * sum(length**2 for length in lengths))


def layer_flops(hf: dict, lengths: list[int]) -> float:
    """The same of the transformer layers alone, without the head."""
    return training_flops(hf, lengths) - 6 * hf["vocab_size"] * hf["hidden_size"] * sum(lengths)


def peak(device: str, fp8: bool) -> float | None:
    """Operations a second of a device by its name, None where it is not in the table."""
    found = sorted((name for name in PEAK if name in device), key=len)
    return PEAK[found[-1]][fp8] if found else None

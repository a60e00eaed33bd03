"""Floating-point operations of a training step, counted the usual way: 6 a weight and token, and the attention."""

PEAK = {  # dense, operations a second, by a part of the device's name: (bf16, FP8), from the vendor's data sheets
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "H20": (148e12, 296e12),
    "B200": (2250e12, 4500e12),
    "A100": (312e12, None),
}


def matmul_weights(hf: dict) -> int:
    """Weights that every token is multiplied with: the layers' and the head's (an embedding is looked up). hf: a config.json."""
    hidden, heads, ffn = hf["hidden_size"], hf["num_attention_heads"], hf["intermediate_size"]
    head = hf.get("head_dim") or hidden // heads
    queries, keys = heads * head, hf["num_key_value_heads"] * head
    layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * ffn
    return hf["num_hidden_layers"] * layer + hidden * hf["vocab_size"]


def training_flops(hf: dict, lengths: list[int]) -> float:
    """Forward and backward over sequences of these lengths, each attending causally to itself; what is computed twice counts once.

    A causal score matrix of a sequence of L has L² / 2 entries a head; scores and values take 2 operations an entry and dimension
    each, forward; backward takes twice as much.
    """
    width = hf["num_attention_heads"] * (hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
    attention = 6 * hf["num_hidden_layers"] * width * sum(length**2 for length in lengths)
    return 6 * matmul_weights(hf) * sum(lengths) + attention


def peak(device: str, fp8: bool) -> float | None:
    """Operations a second of a device by its name, None where it is not in the table."""
    found = sorted((name for name in PEAK if name in device), key=len)
    return PEAK[found[-1]][fp8] if found else None

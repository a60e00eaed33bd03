"""Qwen2 and Qwen2.5 (model_type qwen2): biases on q, k and v only."""

from megatron_nft.weights.table import ATTENTION_OUTPUT, INPUT_NORM, MLP_DOWN, MLP_GATE_UP, MLP_NORM, QKV, QKV_BIAS, Entry

LAYER = (INPUT_NORM, QKV, QKV_BIAS, ATTENTION_OUTPUT, MLP_NORM, MLP_GATE_UP, MLP_DOWN)


def layer_entries(config: dict, layer: int) -> tuple[Entry, ...]:
    """Every layer is alike."""
    return LAYER

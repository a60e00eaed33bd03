"""Qwen3 (model_type qwen3): a norm over each head of the queries and of the keys, no biases."""

from megatron_nft.errors import UserError
from megatron_nft.weights.table import (
    ATTENTION_OUTPUT,
    INPUT_NORM,
    KEY_NORM,
    MLP_DOWN,
    MLP_GATE_UP,
    MLP_NORM,
    QKV,
    QUERY_NORM,
    Entry,
)

ATTENTION = (INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, ATTENTION_OUTPUT, MLP_NORM)
LAYER = (*ATTENTION, MLP_GATE_UP, MLP_DOWN)


def layer_entries(config: dict, layer: int) -> tuple[Entry, ...]:
    """Every layer is alike. Raises UserError for the biases that the config allows and no published Qwen3 has."""
    if config.get("attention_bias"):
        raise UserError(f"config.json of this {config['model_type']} model sets attention_bias", "choose a model without biases")
    return LAYER

"""Llama (model_type llama), Llama-shaped models such as SmolLM2 included: no biases."""

from megatron_nft.errors import UserError
from megatron_nft.weights.table import ATTENTION_OUTPUT, INPUT_NORM, MLP_DOWN, MLP_GATE_UP, MLP_NORM, QKV, Entry

LAYER = (INPUT_NORM, QKV, ATTENTION_OUTPUT, MLP_NORM, MLP_GATE_UP, MLP_DOWN)


def layer_entries(config: dict, layer: int) -> tuple[Entry, ...]:
    """Every layer is alike. Raises UserError for the biases that Llama's config allows and no published Llama has."""
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"config.json of this Llama model sets {key}", "choose a model without biases")
    return LAYER

"""Mistral (model_type mistral), Mistral-Nemo's wide heads included: Llama's layers, with attention over all tokens."""

from megatron_nft.errors import UserError
from megatron_nft.weights.llama import LAYER
from megatron_nft.weights.table import Entry


def layer_entries(config: dict, layer: int) -> tuple[Entry, ...]:
    """Every layer is alike. Raises UserError for the window of Mistral-7B-v0.1, which no layer of ours computes."""
    window = config.get("sliding_window", 4096)  # what transformers takes where config.json says nothing
    if window is not None:
        raise UserError(
            f"this Mistral model has sliding-window attention (sliding_window in config.json is {window})",
            "choose one with full attention (sliding_window is null), such as v0.2 and later",
        )
    return LAYER

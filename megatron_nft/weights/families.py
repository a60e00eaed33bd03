"""The supported model families, by the model_type of config.json."""

from megatron_nft.errors import UserError
from megatron_nft.weights import llama, mistral, qwen2, qwen3, qwen3_moe
from megatron_nft.weights.table import Table

FAMILIES = {
    "llama": llama.layer_entries,
    "mistral": mistral.layer_entries,
    "qwen2": qwen2.layer_entries,
    "qwen3": qwen3.layer_entries,
    "qwen3_moe": qwen3_moe.layer_entries,
}


def table_for(hf_config: dict) -> Table:
    """The table of a Hugging Face config.json. Raises UserError for a family without one, or an incomplete config."""
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not supported", f"choose a model of one of these families: {', '.join(FAMILIES)}")
    try:
        return Table(hf_config, FAMILIES[family])
    except TypeError as error:  # a setting of the family's own that is no number, or no list of them
        raise UserError(f"config.json is not of a {family} model's form ({error})", "take the model's own config.json") from error

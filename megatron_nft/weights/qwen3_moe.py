"""Qwen3-MoE (model_type qwen3_moe): Qwen3 with a router and experts in place of the MLP, in all layers or in some."""

from functools import lru_cache

from megatron_nft.weights import qwen3
from megatron_nft.weights.layouts import GateUp, Split, Whole, expert_count
from megatron_nft.weights.table import Entry

ROUTER = Entry("mlp.router.weight", {"mlp.gate.weight": "experts hidden"}, Whole())


def layer_entries(config: dict, layer: int) -> tuple[Entry, ...]:
    """Experts as MoE layers have them, Qwen3's MLP elsewhere."""
    dense = qwen3.layer_entries(config, layer)
    return (*qwen3.ATTENTION, ROUTER, *_experts(expert_count(config))) if is_sparse(config, layer) else dense


def is_sparse(config: dict, layer: int) -> bool:
    """Whether a layer (counted from 0) has experts."""
    return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


@lru_cache(maxsize=4)
def _experts(count: int) -> tuple[Entry, ...]:
    return tuple(entry for expert in range(count) for entry in _expert(expert))


def _expert(expert: int) -> tuple[Entry, Entry]:
    ours, theirs = f"mlp.experts.local_experts.{expert}", f"mlp.experts.{expert}"
    gate_up = {f"{theirs}.gate_proj.weight": "expert_ffn hidden", f"{theirs}.up_proj.weight": "expert_ffn hidden"}
    return (
        Entry(f"{ours}.linear_fc1.weight", gate_up, GateUp()),
        Entry(f"{ours}.linear_fc2.weight", {f"{theirs}.down_proj.weight": "hidden expert_ffn"}, Split(dim=1)),
    )

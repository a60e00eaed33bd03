"""Which parameters a rank holds: by stage, chunk and rank of Megatron's layout, in the order in which Megatron registers them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Layout
from megatron_nft.weights import Table, expert_number, table_for
from megatron_nft.weights.table import EMBEDDING, FINAL_NORM, HEAD

# A layer's parameters as Megatron's modules register them. Transformer Engine keeps a norm inside the linear layer behind it (only that
# before a mixture of experts stands alone), and all first weights of a layer's experts before all second ones.
_LATER = ("linear_qkv", "q_layernorm", "k_layernorm", "pre_mlp_layernorm", "router", "experts", "linear_fc")
_LOCAL = ("input_layernorm", "linear_proj", *_LATER)
_ENGINE = ("linear_proj", "input_layernorm", *_LATER)
_IN_FP8 = ("linear_proj.weight", "linear_qkv.weight", "linear_fc1.weight", "linear_fc2.weight")  # what Transformer Engine multiplies


@dataclass(frozen=True)
class Parameter:
    """One tensor on a rank."""

    name: str  # Megatron's, with the numbers of the first expert-parallel rank
    numel: int
    expert: bool = False  # reduced over fewer ranks than the others: those that hold the same experts
    alone: bool = False  # in a bucket of its own: a tied embedding that stands on two stages
    fp8: bool = False  # kept in 8 bits
    layer: int | None = None  # counted from 0; None outside the layers


def table_of(hf: dict) -> Table:
    """The table of a config.json, made once: a search asks for it many times, and that of a mixture of experts has thousands of rows."""
    return _table(json.dumps(hf, sort_keys=True))


@lru_cache(maxsize=4)
def _table(hf: str) -> Table:
    return table_for(json.loads(hf))


def chunks(hf: dict, config: Config, layout: Layout, stage: int, transformer_engine: bool = True) -> list[list[Parameter]]:
    """The parameters of a pipeline stage's chunks, one chunk where the pipeline is not interleaved; alike on all ranks of the stage.

    transformer_engine: layers are its own, as on a GPU; otherwise Megatron's local ones.
    """
    table, held = table_of(hf), [layers_of(hf, layout, stage, chunk) for chunk in range(layout.vpp)]
    return [
        [_parameter(name, layer, table, config, layout) for layer, name in _names(table, layout, layers, transformer_engine)]
        for layers in held
    ]


def layers_of(hf: dict, layout: Layout, stage: int, chunk: int = 0) -> range:
    """The layers of a chunk: chunk after chunk goes round the stages."""
    count = hf["num_hidden_layers"] // (layout.pp * layout.vpp)
    first = (chunk * layout.pp + stage) * count
    return range(first, first + count)


def total(hf: dict) -> int:
    """Weights of the whole model, without padding; a tied head counts once."""
    return _total(json.dumps(hf, sort_keys=True))


@lru_cache(maxsize=4)
def _total(hf: str) -> int:
    return _table(hf).parameters()


def _names(table: Table, layout: Layout, layers: range, transformer_engine: bool) -> Iterator[tuple[int | None, str]]:
    """(layer, name) in the order of the modules."""
    first, last = layers.start == 0, layers.stop == table.sizes.layers
    copy = table.tied and layout.pp > 1  # the last stage's own copy of the embedding
    if first:
        yield None, EMBEDDING.megatron
    for layer in layers:
        yield from ((layer, name) for name in _layer(table, layout, layer, transformer_engine))
    if last:
        yield None, FINAL_NORM.megatron
    if last and (copy or not table.tied):
        yield None, HEAD.megatron


def _layer(table: Table, layout: Layout, layer: int, transformer_engine: bool) -> list[str]:
    held, order = max(table.sizes.experts // layout.ep, 1), _ENGINE if transformer_engine else _LOCAL

    def key(name: str) -> tuple:
        place = next(number for number, part in enumerate(order) if part in name)
        expert, second = expert_number(name) or 0, "linear_fc2" in name
        return (place, *((second, expert) if transformer_engine else (expert, second)))

    return sorted((name for name in table.layer_names(layer) if (expert_number(name) or 0) < held), key=key)


def _parameter(name: str, layer: int | None, table: Table, config: Config, layout: Layout) -> Parameter:
    expert = expert_number(name) is not None
    numel = prod(table.shard_shape(name, layout.etp if expert else layout.tp))
    tied = table.tied and layout.pp > 1 and name in (EMBEDDING.megatron, HEAD.megatron)
    fp8 = config.model.fp8_param_gather and is_fp8(name, config, table.sizes.layers)
    return Parameter(name, numel, expert and layout.ep > 1, tied, fp8, layer)


def is_fp8(name: str, config: Config, layers: int) -> bool:
    """Whether a parameter is multiplied in FP8: a linear layer's weight, unless the layer is one of the first or last kept in bf16."""
    model = config.model
    if not (model.fp8 and name.endswith(_IN_FP8)):
        return False
    layer = int(name.split(".")[2])
    start, end = (model.num_layers_at_start_in_bf16, model.num_layers_at_end_in_bf16) if model.first_last_layers_bf16 else (0, 0)
    return start <= layer < layers - end

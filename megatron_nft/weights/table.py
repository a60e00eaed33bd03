"""The table of a model: which Hugging Face tensors make which Megatron tensor, for the whole model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import gcd, prod

from torch import Tensor

from megatron_nft.errors import UserError
from megatron_nft.weights.layouts import GateUp, Pairs, QueryKeyValue, Sizes, Split, Vocabulary, Whole

# The Transformer Engine layer spec keeps a norm inside the linear layer that follows it; ours are the local spec's names.
ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# A sequence of experts numbers them in the module's name, Transformer Engine's grouped experts in the weight's.
EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(?P<expert>\d+)\.")
GROUPED = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(?P<expert>\d+)$")


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor. In a family's file both names are relative to the layer."""

    megatron: str
    huggingface: dict[str, str]  # name -> shape in words of layouts.Sizes
    layout: Whole

    def within(self, layer: int) -> "Entry":
        """The same entry under the full names of a layer (counted from 0)."""
        huggingface = {f"model.layers.{layer}.{name}": shape for name, shape in self.huggingface.items()}
        return Entry(f"decoder.layers.{layer}.{self.megatron}", huggingface, self.layout)


# What dense decoders have in common; a family's file picks from these and adds its own.
INPUT_NORM = Entry("input_layernorm.weight", {"input_layernorm.weight": "hidden"}, Whole())
QKV = Entry(
    "self_attention.linear_qkv.weight",
    {
        "self_attn.q_proj.weight": "query hidden",
        "self_attn.k_proj.weight": "key hidden",
        "self_attn.v_proj.weight": "key hidden",
    },
    QueryKeyValue(),
)
QKV_BIAS = Entry(
    "self_attention.linear_qkv.bias",
    {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
    QueryKeyValue(),
)
ATTENTION_OUTPUT = Entry("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}, Split(dim=1))
QUERY_NORM = Entry("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}, Whole())
KEY_NORM = Entry("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}, Whole())
MLP_NORM = Entry("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "hidden"}, Whole())
MLP_GATE_UP = Entry("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"}, GateUp())
MLP_DOWN = Entry("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}, Split(dim=1))

EMBEDDING = Entry("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocabulary hidden"}, Vocabulary())
FINAL_NORM = Entry("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}, Whole())
HEAD = Entry("output_layer.weight", {"lm_head.weight": "vocabulary hidden"}, Vocabulary())


class Table:
    """Names, shapes and tensors of one model, both ways.

    Megatron names carry global layer and expert numbers. Wherever one is taken, Transformer Engine's names of the norms and of grouped
    experts are understood too, and in a tied model output_layer.weight, which the last pipeline stage holds as its copy of the embedding.
    """

    def __init__(self, config: dict, layer_entries: Callable[[dict, int], tuple[Entry, ...]]):
        """config: a Hugging Face config.json. layer_entries(config, layer): the family's entries of that layer."""
        self.config, self.sizes = config, Sizes.of(config)
        layers = [[entry.within(layer) for entry in layer_entries(config, layer)] for layer in range(self.sizes.layers)]
        self._of_layers = [[entry.megatron for entry in layer] for layer in layers]
        entries = [EMBEDDING, *chain.from_iterable(layers), FINAL_NORM, *([] if self.sizes.tied else [HEAD])]
        self._entries = {entry.megatron: entry for entry in entries}
        self._canonical: dict[str, str] = {}  # of the names that were asked for: a weight sync asks for all of them, several times
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.sizes.tied

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return QKV_BIAS.within(0).megatron in self._entries

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed, head by head."""
        return QUERY_NORM.within(0).megatron in self._entries

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (counted from 0) is a mixture of experts."""
        return f"decoder.layers.{layer}.mlp.router.weight" in self._entries

    def canonical(self, megatron_name: str) -> str:
        """The name this table lists a tensor under. Raises ValueError for a name no such model has."""
        if megatron_name not in self._canonical:
            self._canonical[megatron_name] = self._listed(megatron_name)
        return self._canonical[megatron_name]

    def _listed(self, megatron_name: str) -> str:
        name = megatron_name
        if self.tied and name == HEAD.megatron:
            return EMBEDDING.megatron
        name = GROUPED.sub(r".mlp.experts.local_experts.\g<expert>.\1.weight", name)
        for alias, plain in ALIASES.items():
            if name.endswith("." + alias):
                name = name.removesuffix(alias) + plain
        if name not in self._entries:
            raise ValueError(f"a {self.config['model_type']} model of {self.sizes.layers} layers has no Megatron tensor {megatron_name}")
        return name

    def megatron_names(self) -> list[str]:
        """Every Megatron tensor of the whole model, in model order; a tied head is not among them."""
        return list(self._entries)

    def layer_names(self, layer: int) -> list[str]:
        """The Megatron tensors of a layer (counted from 0), in model order."""
        return list(self._of_layers[layer])

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor and its shape, in model order; a tied head is not among them."""
        return {name: self.sizes.shape(words) for entry in self._entries.values() for name, words in entry.huggingface.items()}

    def parameters(self) -> int:
        """Of the whole model, without padding; a tied head counts once."""
        return sum(map(prod, self.hf_shapes().values()))

    def hf_shapes_of(self, megatron_name: str) -> dict[str, tuple[int, ...]]:
        """The Hugging Face tensors in one Megatron tensor, and their shapes."""
        name = self.canonical(megatron_name)
        if name not in self._shapes:
            self._shapes[name] = {part: self.sizes.shape(words) for part, words in self._entries[name].huggingface.items()}
        return self._shapes[name]

    def shard_shape(self, megatron_name: str, tp_size: int) -> tuple[int, ...]:
        """Of one rank's slice, padding included; of an expert's tensor tp is the experts' own."""
        return self._entry(megatron_name).layout.shape(list(self.hf_shapes_of(megatron_name).values()), tp_size)

    def to_megatron(self, megatron_name: str, get: Callable[[str], Tensor], tp_rank: int = 0, tp_size: int = 1) -> Tensor:
        """A rank's slice of a Megatron tensor from `get` of a Hugging Face name, a cut vocabulary padded with zero rows; of an expert's, tp
        is the experts' own. What needs no rearranging is the very tensor that `get` gave.

        Raises UserError as check_tensor_parallel and check_expert_parallel do.
        """
        self._check_cut(megatron_name, tp_size)
        parts = [get(name) for name in self._entry(megatron_name).huggingface]
        shape = self.shard_shape(megatron_name, tp_size)
        if len(parts) == 1 and parts[0].shape == shape:
            return parts[0]
        shard = parts[0].new_zeros(shape)
        for mine, theirs in self._pairs(megatron_name, shard, parts, tp_rank, tp_size):
            mine.copy_(theirs)
        return shard

    def to_hf(self, megatron_name: str, full: Tensor) -> list[tuple[str, Tensor]]:
        """The Hugging Face tensors in a full Megatron tensor, neither sharded nor padded; the inverse of to_megatron. As there, what needs
        no rearranging is the very tensor."""
        shapes = self.hf_shapes_of(megatron_name)
        if len(shapes) == 1:
            return [(name, full) for name in shapes]
        return self._collected(megatron_name, [full])

    def collect(self, megatron_name: str, shards: Sequence[Tensor], parts: list[Tensor]) -> None:
        """Copy every rank's slice of a tensor, in rank order, to its places in the Hugging Face tensors, which are given."""
        for mine, theirs in self.places(megatron_name, shards, parts):
            theirs.copy_(mine)

    def places(self, megatron_name: str, shards: Sequence[Tensor], parts: list[Tensor]) -> Pairs:
        """What `collect` copies: (view of a rank's slice, view of a Hugging Face tensor), two by two."""
        cut = self._entry(megatron_name).layout.cut
        ranks = enumerate(shards if cut else shards[:1])
        return [pair for rank, shard in ranks for pair in self._pairs(megatron_name, shard, parts, rank, len(shards))]

    def shard(self, megatron_name: str, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """One rank's slice of a full tensor; otherwise as to_megatron."""
        return self.to_megatron(megatron_name, dict(self.to_hf(megatron_name, full)).__getitem__, tp_rank, tp_size)

    def unshard(self, megatron_name: str, shards: list[Tensor]) -> Tensor:
        """The full tensor from every rank's slice, in rank order; the inverse of shard, padding taken off."""
        return self.to_megatron(megatron_name, dict(self._collected(megatron_name, shards)).__getitem__)

    def _collected(self, megatron_name: str, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        parts = {name: shards[0].new_empty(shape) for name, shape in self.hf_shapes_of(megatron_name).items()}
        self.collect(megatron_name, shards, list(parts.values()))
        return list(parts.items())

    def _pairs(self, megatron_name: str, shard: Tensor, parts: list[Tensor], rank: int, size: int) -> Pairs:
        return self._entry(megatron_name).layout.pairs(shard, parts, rank, size, self.sizes)

    def _check_cut(self, megatron_name: str, tp_size: int) -> None:
        if expert_number(megatron_name) is None:
            self.check_tensor_parallel(tp_size)
        else:
            self.check_expert_parallel(1, tp_size)

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise UserError unless heads, key-value heads and the MLP divide by tp_size."""
        sizes = {
            "num_attention_heads": self.sizes.heads,
            "num_key_value_heads": self.sizes.groups,
            "intermediate_size": self.sizes.ffn,
        }
        common = gcd(*sizes.values())
        for name, size in sizes.items():
            if size % tp_size:
                possible = ", ".join(str(n) for n in range(1, self.sizes.groups + 1) if common % n == 0)
                raise UserError(f"{name} ({size}) cannot be divided by tensor_model_parallel_size ({tp_size})", f"use one of: {possible}")

    def check_expert_parallel(self, ep_size: int, tp_size: int) -> None:
        """Of a model with experts. Raise UserError unless they divide by ep_size, and each of them by tp_size, the experts' own."""
        for name, size, setting, by in (
            ("num_experts", self.sizes.experts, "expert_model_parallel_size", ep_size),
            ("moe_intermediate_size", self.sizes.expert_ffn, "expert_tensor_parallel_size", tp_size),
        ):
            if size % by:
                possible = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
                raise UserError(f"{name} ({size}) cannot be divided by {setting} ({by})", f"use one of: {possible}")

    def _entry(self, megatron_name: str) -> Entry:
        return self._entries[self.canonical(megatron_name)]


def expert_number(megatron_name: str) -> int | None:
    """Which expert a tensor belongs to; None for a tensor of no expert."""
    found = EXPERT.search(megatron_name) or GROUPED.search(megatron_name)
    return int(found["expert"]) if found else None


def with_expert(megatron_name: str, expert: int) -> str:
    """The name of another expert's tensor."""
    found = EXPERT.search(megatron_name) or GROUPED.search(megatron_name)
    return megatron_name[: found.start("expert")] + str(expert) + megatron_name[found.end("expert") :]

"""How a Megatron tensor is made of Hugging Face tensors, and how tensor parallelism cuts it.

Dim 0 of a linear weight is its output, dim 1 its input, in both worlds. A layout answers four questions:
join and part (between Hugging Face parts and the full Megatron tensor), shard and unshard (between full and one slice a rank).
All of them return views where a view does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nft.errors import UserError


def padded_vocab_size(vocab_size: int, tp_size: int, divisible_by: int = 1) -> int:
    """Rows of the embedding over all tensor-parallel ranks: the next multiple of tp_size x divisible_by."""
    multiple = tp_size * divisible_by
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config.json that decide shapes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int  # key-value heads
    head: int  # size of one head
    vocabulary: int
    tied: bool  # the head is the embedding
    experts: int = 0  # of a layer that has them; 0: a dense model
    expert_ffn: int = 0  # inner size of an expert

    @classmethod
    def of(cls, config: dict) -> "Sizes":
        """Read a config.json. Raises UserError for a number that is missing or does not fit the others."""

        def number(key: str) -> int:
            if config.get(key) is None:
                raise UserError(f"config.json has no {key}", "take the model's complete config.json")
            if not isinstance(config[key], int) or config[key] < 1:
                raise UserError(f"{key} in config.json is {config[key]!r}, not a positive number", "take the model's own config.json")
            return config[key]

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        groups = number("num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        own, experts = "take the model's own config.json", expert_count(config)
        if heads % groups:
            raise UserError(f"num_attention_heads in config.json ({heads}) cannot be divided by num_key_value_heads ({groups})", own)
        if not config.get("head_dim") and hidden % heads:
            raise UserError(f"hidden_size in config.json ({hidden}) cannot be divided by num_attention_heads ({heads})", own)
        return cls(
            layers=number("num_hidden_layers"),
            hidden=hidden,
            ffn=number("intermediate_size"),
            heads=heads,
            groups=groups,
            head=config.get("head_dim") or hidden // heads,
            vocabulary=number("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            experts=experts,
            expert_ffn=number("moe_intermediate_size") if experts else 0,
        )

    @property
    def query(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.groups * self.head

    def shape(self, words: str) -> tuple[int, ...]:
        """The numbers of words such as "query hidden"."""
        return tuple(getattr(self, word) for word in words.split())


def expert_count(config: dict) -> int:
    """Experts of a mixture; 0 for a dense model. transformers 4 and 5 spell it differently."""
    count = config.get("num_experts") or config.get("num_local_experts") or 0
    if not isinstance(count, int) or (count == 0 and config.get("moe_intermediate_size")):
        raise UserError("config.json has a moe_intermediate_size and no num_experts", "take the model's complete config.json")
    return count


class Whole:
    """One Hugging Face tensor, the same on every tensor-parallel rank. The base of the other layouts."""

    def join(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        (only,) = parts
        return only

    def part(self, full: Tensor, sizes: Sizes) -> list[Tensor]:
        return [full]

    def shard(self, full: Tensor, rank: int, size: int, sizes: Sizes) -> Tensor:
        return full

    def unshard(self, shards: list[Tensor], sizes: Sizes) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class Split(Whole):
    """One Hugging Face tensor, cut into equal chunks: dim 0 in a column-parallel layer, dim 1 in a row-parallel one."""

    dim: int

    def shard(self, full: Tensor, rank: int, size: int, sizes: Sizes) -> Tensor:
        return full.chunk(size, self.dim)[rank]

    def unshard(self, shards: list[Tensor], sizes: Sizes) -> Tensor:
        return _cat(shards, self.dim)


class Vocabulary(Whole):
    """[vocabulary, hidden], padded with zero rows at the end to equal chunks of dim 0."""

    def shard(self, full: Tensor, rank: int, size: int, sizes: Sizes) -> Tensor:
        rows = padded_vocab_size(sizes.vocabulary, size) // size
        mine = full[rank * rows : (rank + 1) * rows]
        return mine if len(mine) == rows else torch.cat([mine, mine.new_zeros(rows - len(mine), *full.shape[1:])])

    def unshard(self, shards: list[Tensor], sizes: Sizes) -> Tensor:
        return _cat(shards, 0)[: sizes.vocabulary]


class QueryKeyValue(Split):
    """q, k and v fused per query group: for each key-value head the query heads it serves, then its k, then its v.

    A chunk of dim 0 then holds whole groups. Works on weights [rows, hidden] and on biases [rows].
    """

    def __init__(self):
        super().__init__(dim=0)

    def join(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        rest = parts[0].shape[1:]
        return torch.cat([part.reshape(sizes.groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)

    def part(self, full: Tensor, sizes: Sizes) -> list[Tensor]:
        rest = full.shape[1:]
        rows = [sizes.query // sizes.groups, sizes.head, sizes.head]  # of one group
        return [part.reshape(-1, *rest) for part in full.reshape(sizes.groups, -1, *rest).split(rows, dim=1)]


class GateUp(Whole):
    """Gate over up in one weight; every tensor-parallel rank holds its gate rows over its up rows."""

    def join(self, parts: list[Tensor], sizes: Sizes) -> Tensor:
        return torch.cat(parts)

    def part(self, full: Tensor, sizes: Sizes) -> list[Tensor]:
        return list(full.chunk(2))

    def shard(self, full: Tensor, rank: int, size: int, sizes: Sizes) -> Tensor:
        return full if size == 1 else torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])

    def unshard(self, shards: list[Tensor], sizes: Sizes) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        gates, ups = zip(*(shard.chunk(2) for shard in shards))
        return torch.cat([*gates, *ups])


def _cat(shards: list[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim)

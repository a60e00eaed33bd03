"""How a Megatron tensor is made of Hugging Face tensors, and how tensor parallelism cuts it.

Dim 0 of a linear weight is its output, dim 1 its input, in both worlds. A layout answers one question, for both directions: which part
of a tensor-parallel rank's Megatron tensor is which part of the Hugging Face tensors. `pairs` gives views of both sides, two by two of
equal shape: to go to Hugging Face copy the first of each onto the second, to come from there the second onto the first.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_nft.errors import UserError

Pairs = list[tuple[Tensor, Tensor]]  # (view of a rank's Megatron tensor, view of a Hugging Face tensor)


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
            head=number("head_dim") if config.get("head_dim") else hidden // heads,
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

    cut = False  # whether the ranks hold different slices

    def shape(self, parts: list[tuple[int, ...]], size: int) -> tuple[int, ...]:
        """Of a rank's Megatron tensor, from the shapes of its Hugging Face parts. `size` ranks share the tensor."""
        return parts[0]

    def pairs(self, shard: Tensor, parts: list[Tensor], rank: int, size: int, sizes: Sizes) -> Pairs:
        """See the head of this file."""
        return [(shard, parts[0])]


@dataclass(frozen=True)
class Split(Whole):
    """One Hugging Face tensor, cut into equal chunks: dim 0 in a column-parallel layer, dim 1 in a row-parallel one."""

    dim: int
    cut = True

    def shape(self, parts: list[tuple[int, ...]], size: int) -> tuple[int, ...]:
        joined = [sum(part[0] for part in parts), *parts[0][1:]]  # parts lie one over the other
        joined[self.dim] //= size
        return tuple(joined)

    def pairs(self, shard: Tensor, parts: list[Tensor], rank: int, size: int, sizes: Sizes) -> Pairs:
        return [(shard, parts[0].chunk(size, self.dim)[rank])]


class Vocabulary(Whole):
    """[vocabulary, hidden], padded with rows of zeros at the end to equal chunks of dim 0. The padding has no counterpart."""

    cut = True

    def shape(self, parts: list[tuple[int, ...]], size: int) -> tuple[int, ...]:
        return (padded_vocab_size(parts[0][0], size) // size, *parts[0][1:])

    def pairs(self, shard: Tensor, parts: list[Tensor], rank: int, size: int, sizes: Sizes) -> Pairs:
        real = parts[0][rank * len(shard) : (rank + 1) * len(shard)]
        return [(shard[: len(real)], real)]


class QueryKeyValue(Split):
    """q, k and v fused per query group: for each key-value head the query heads it serves, then its k, then its v.

    A chunk of dim 0 then holds whole groups. Works on weights [rows, hidden] and on biases [rows].
    """

    def __init__(self):
        super().__init__(dim=0)

    def pairs(self, shard: Tensor, parts: list[Tensor], rank: int, size: int, sizes: Sizes) -> Pairs:
        groups = (sizes.groups // size, -1)
        rows = [sizes.query // sizes.groups, sizes.head, sizes.head]  # of one group
        return list(zip(shard.unflatten(0, groups).split(rows, dim=1), [part.chunk(size)[rank].unflatten(0, groups) for part in parts]))


class GateUp(Split):
    """Gate over up in one weight; every tensor-parallel rank holds its gate rows over its up rows."""

    def __init__(self):
        super().__init__(dim=0)

    def pairs(self, shard: Tensor, parts: list[Tensor], rank: int, size: int, sizes: Sizes) -> Pairs:
        return list(zip(shard.chunk(2), [part.chunk(size)[rank] for part in parts]))

"""Local Megatron shards in, full Hugging Face tensors out, on every rank in the same order: what the sampler loads.

They come in buckets, each one flat buffer. Shards travel as bytes: each pipeline stage in turn broadcasts its own to the other stages,
then the tensor-parallel ranks gather; for experts, all ranks that hold different experts or slices of them. Broadcasting before
gathering sends every byte between stages once. Every slice that has come is copied straight to its place in the bucket.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nft.weights.buckets import Bucket, Buffers, Slot, room, view
from megatron_nft.weights.layouts import Pairs
from megatron_nft.weights.table import Table, expert_number, with_expert

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Shard:
    """What every rank knows of a Megatron shard: the name, and what to make of its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def room(self) -> int:
        """Bytes taken on the way."""
        return room(self.shape, self.dtype)


@dataclass(frozen=True)
class Ranks:
    """The ranks that together hold a stage's tensors, slices of one adjacent; of experts, `sets` of ranks hold different ones."""

    size: int = 1
    sets: int = 1
    experts: int = 0  # of all sets together
    group: Group = None

    @classmethod
    def of(cls, group: Group, sets: int = 1, experts: int = 0) -> "Ranks":
        return cls(_size(group), sets, experts, group)

    def names(self, shard: Shard) -> list[str]:
        """What the shard of this rank is on each set of ranks, which hold equally many experts in the same order."""
        if self.sets == 1:
            return [shard.name]
        held = self.experts // self.sets
        return [with_expert(shard.name, number * held + expert_number(shard.name) % held) for number in range(self.sets)]


@dataclass(frozen=True)
class Load:
    """A bucket that is to be: shards of one stage, and the places of what becomes of them."""

    stage: int
    ranks: Ranks
    shards: list[Shard]
    slots: list[Slot]

    @property
    def sent(self) -> int:
        """Bytes of the shards of one rank."""
        return sum(shard.room for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the bucket."""
        return sum(room(slot.shape, slot.dtype) for slot in self.slots)


def stream(
    named: Iterable[tuple[str, Tensor]],
    table: Table,
    tp_group: Group = None,
    pp_group: Group = None,
    expert_group: Group = None,
    expert_parallel_size: int = 1,
    bucket_bytes: int = 256 * 2**20,
    values: Callable[[Tensor], Tensor] = Tensor.detach,
    buffers: Buffers | None = None,
) -> Iterator[Bucket]:
    """Every tensor of the model under its Hugging Face name, full, in buckets that are alike on all ranks. A collective: call it and
    exhaust it on all ranks.

    named: this rank's tensors with Megatron names (global layer and expert numbers), those of its pipeline stage only. What is sent is
    values(tensor), of the tensor's shape, made when its bucket's turn comes.
    expert_group: the ranks that together hold a stage's experts, slices of an expert adjacent; expert_parallel_size of them hold
    different experts, equally many.
    bucket_bytes: a bucket holds at most this, or what one Megatron tensor holds. Memory: a bucket, its gathered shards or what `values`
    made anew (as many bytes again, none where nothing is gathered or made), and each earlier bucket of which the consumer still keeps a
    tensor.
    Raises ValueError where the ranks together do not hold every tensor of the table.
    """
    table.check_tensor_parallel(_size(tp_group))
    mine = {table.canonical(name): tensor for name, tensor in named}
    stages = _everyones([Shard(name, tuple(tensor.shape), values(tensor).dtype) for name, tensor in mine.items()], pp_group)
    experts = Ranks.of(expert_group, expert_parallel_size, table.sizes.experts)
    loads = list(plan(stages, table, Ranks.of(tp_group), experts, bucket_bytes))
    held = {name for load in loads for shard in load.shards for name in load.ranks.names(shard)}
    if missing := set(table.megatron_names()) - held:
        raise ValueError(f"no rank holds {len(missing)} tensors of the model, among them {min(missing)}")
    device = next(iter(mine.values())).device
    largest = max(max(load.nbytes, load.sent * load.ranks.size) for load in loads)
    empty = partial((buffers or Buffers()).empty, largest=largest, device=device)
    fill = partial(_filled, mine=mine, table=table, pp_group=pp_group, values=values, empty=empty)
    return map(fill, loads)  # which keeps no bucket while it fills the next


def plan(stages: list[list[Shard]], table: Table, dense: Ranks, experts: Ranks, bucket_bytes: int) -> Iterator[Load]:
    """The buckets in the order in which they are filled, from what a rank of each stage holds; stage by stage, those of experts last."""
    seen: set[str] = set()
    for stage, shards in enumerate(stages):
        own = [s for s in shards if not (s.name in seen or seen.add(s.name))]  # a tied embedding stands on two stages: the first sends it
        if dense.size == experts.size == 1:
            yield from _loads(stage, dense, own, table, bucket_bytes)
            continue
        yield from _loads(stage, dense, [s for s in own if expert_number(s.name) is None], table, bucket_bytes)
        yield from _loads(stage, experts, [s for s in own if expert_number(s.name) is not None], table, bucket_bytes)


def _loads(stage: int, ranks: Ranks, shards: list[Shard], table: Table, limit: int) -> Iterator[Load]:
    """Runs of shards whose buckets hold at most `limit` bytes; a larger tensor has one of its own."""
    load, filled = Load(stage, ranks, [], []), 0
    for shard in shards:
        parts = [part for name in ranks.names(shard) for part in table.hf_shapes_of(name).items()]
        size = sum(room(shape, shard.dtype) for _, shape in parts)
        if load.shards and filled + size > limit:
            yield load
            load, filled = Load(stage, ranks, [], []), 0
        load.shards.append(shard)
        for name, shape in parts:
            load.slots.append(Slot(name, shape, shard.dtype, filled))
            filled += room(shape, shard.dtype)
    if load.shards:
        yield load


def _everyones(local: list[Shard], pp_group: Group) -> list[list[Shard]]:
    """What the ranks of each stage hold."""
    if _size(pp_group) == 1:
        return [local]
    stages = [None] * _size(pp_group)
    dist.all_gather_object(stages, local, group=pp_group)
    return stages


@torch.no_grad()
def _filled(
    load: Load,
    mine: dict[str, Tensor],
    table: Table,
    pp_group: Group,
    values: Callable[[Tensor], Tensor],
    empty: Callable[[int], Tensor],
) -> Bucket:
    bucket = Bucket(empty(load.nbytes), load.slots)
    places = dict(bucket.tensors())
    if load.ranks.size == _size(pp_group) == 1:
        slices = ((shard.name, [values(mine[shard.name])]) for shard in load.shards)
    else:
        slices = _unpacked(load, gather(received(load, mine, pp_group, values, empty), load.ranks, empty))
    _copy([pair for name, pieces in slices for pair in table.places(name, pieces, [places[part] for part in table.hf_shapes_of(name)])])
    return bucket


def _copy(pairs: Pairs) -> None:
    """The first of each pair onto the second. Those without gaps go together, where one kernel can do many: most tensors are small, and to
    start a copy takes longer than the copy."""
    together, apart = [], []
    for pair in pairs:
        gapless = _fuses(pair[1].device) and pair[0].is_contiguous() and pair[1].is_contiguous()
        (together if gapless else apart).append(pair)
    if together:
        torch._foreach_copy_([theirs for _, theirs in together], [mine for mine, _ in together])
    for mine, theirs in apart:
        theirs.copy_(mine)


def _fuses(device: torch.device) -> bool:
    """Whether torch has one kernel for many copies."""
    return device.type == "cuda"


def received(
    load: Load, mine: dict[str, Tensor], pp_group: Group, values: Callable[[Tensor], Tensor], empty: Callable[[int], Tensor]
) -> Tensor:
    """The shards of a load on every rank as its counterpart on their stage holds them: uint8 [sent]."""
    packed, start = empty(load.sent), 0
    if _size(pp_group) == 1 or load.stage == dist.get_rank(pp_group):
        for shard in load.shards:
            view(packed, start, shard.shape, shard.dtype).copy_(values(mine[shard.name]))
            start += shard.room
    if _size(pp_group) > 1:
        dist.broadcast(packed, group=pp_group, group_src=load.stage)
    return packed


def gather(packed: Tensor, ranks: Ranks, empty: Callable[[int], Tensor]) -> Tensor:
    """uint8 [sent] -> [ranks, sent]."""
    if ranks.size == 1:
        return packed[None]
    gathered = empty(ranks.size * len(packed))  # flat: gloo refuses an output of more dimensions than the input
    dist.all_gather_into_tensor(gathered, packed, group=ranks.group)
    return gathered.view(-1, len(packed))


def _unpacked(load: Load, gathered: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """Names and their slices, in rank order, from uint8 [ranks, sent]."""
    start, each = 0, load.ranks.size // load.ranks.sets
    for shard in load.shards:
        pieces = [view(row, start, shard.shape, shard.dtype) for row in gathered]
        for number, name in enumerate(load.ranks.names(shard)):
            yield name, pieces[number * each : (number + 1) * each]
        start += shard.room


def _size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)

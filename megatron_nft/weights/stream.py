"""Local Megatron shards in, full Hugging Face tensors out, on every rank in the same order: what the sampler loads.

A tensor travels in a bucket of bytes: each pipeline stage in turn broadcasts its shards to the other stages, then the
tensor-parallel ranks gather; for experts, all ranks that hold different experts or slices of them. Broadcasting before gathering sends
every byte between stages once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nft.weights.table import Table, expert_number, with_expert

Group = dist.ProcessGroup | None
ALIGNMENT = 16  # bytes: a slice of a bucket can be viewed as any dtype


@dataclass(frozen=True)
class _Shard:
    """What every rank knows of a shard: the name, and what to make of its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes taken in a bucket."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def stream(
    named: Iterable[tuple[str, Tensor]],
    table: Table,
    tp_group: Group = None,
    pp_group: Group = None,
    expert_group: Group = None,
    expert_parallel_size: int = 1,
    bucket_bytes: int = 256 * 2**20,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model under its Hugging Face name, full, in the same order on all ranks. A collective.

    named: this rank's tensors with Megatron names (global layer and expert numbers), those of its pipeline stage only.
    expert_group: the ranks that together hold a stage's experts, slices of an expert adjacent; expert_parallel_size of them hold
    different experts, equally many.
    bucket_bytes: a gathered bucket holds at most this, or one tensor. Memory: a bucket, its gathered copy and one full tensor,
    for as long as the consumer keeps no tensor. The tensors may be views of the parameters: read them, do not write.
    Without groups, or with groups of one rank, nothing is sent or copied and `named` is consumed lazily.
    Raises ValueError where the ranks together do not hold every tensor of the table.
    """
    table.check_tensor_parallel(_size(tp_group))
    experts = _Experts(expert_group, expert_parallel_size, table.sizes.experts)
    alone = _size(tp_group) == _size(pp_group) == _size(expert_group) == 1
    pairs = _local(named, table) if alone else _gathered(dict(named), table, tp_group, pp_group, experts, bucket_bytes)
    missing = set(table.megatron_names())
    for name, full in pairs:
        missing.remove(name)
        yield from table.to_hf(name, full)
    if missing:
        raise ValueError(f"no rank holds {len(missing)} tensors of the model, among them {min(missing)}")


def _local(named: Iterable[tuple[str, Tensor]], table: Table) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and full tensors of a model that is not cut."""
    for name, tensor in named:
        yield table.canonical(name), table.unshard(name, [tensor.detach()])


@dataclass(frozen=True)
class _Experts:
    """Who holds the experts of a stage."""

    group: Group
    ranks: int  # with different experts
    count: int  # of all ranks

    def rows(self, bucket: list[_Shard], gathered: Tensor) -> Iterator[tuple[list[_Shard], Tensor]]:
        """The bucket under the names of each rank's experts, with the rows that hold them. gathered: uint8 [ranks x slices, bucket]"""
        held = self.count // self.ranks
        for rank, slices in enumerate(gathered.chunk(self.ranks)):
            yield [replace(s, name=with_expert(s.name, rank * held + expert_number(s.name) % held)) for s in bucket], slices


def _gathered(
    tensors: dict[str, Tensor], table: Table, tp_group: Group, pp_group: Group, experts: _Experts, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and full tensors, stage by stage, those of experts last."""
    mine = {table.canonical(name): tensor.detach() for name, tensor in tensors.items()}
    for stage, shards in enumerate(_plan(mine, pp_group)):
        dense, of_experts = ([s for s in shards if (expert_number(s.name) is not None) == kind] for kind in (False, True))
        for bucket, packed in _received(dense, stage, mine, pp_group, bucket_bytes // _size(tp_group)):
            yield from _unpack(bucket, _all_gather(packed, tp_group), table)
        for bucket, packed in _received(of_experts, stage, mine, pp_group, bucket_bytes // _size(experts.group)):
            for renamed, slices in experts.rows(bucket, _all_gather(packed, experts.group)):
                yield from _unpack(renamed, slices, table)


def _received(
    shards: list[_Shard], stage: int, mine: dict[str, Tensor], pp_group: Group, limit: int
) -> Iterator[tuple[list[_Shard], Tensor]]:
    """Buckets of a stage's shards, on every rank as its counterpart on that stage holds them: uint8 [bucket], at most `limit` bytes."""
    device = next(iter(mine.values())).device
    sending = stage == (dist.get_rank(pp_group) if _size(pp_group) > 1 else 0)
    for bucket in _buckets(shards, limit):
        packed = _pack(bucket, mine, device) if sending else torch.empty(sum(s.room for s in bucket), dtype=torch.uint8, device=device)
        if _size(pp_group) > 1:
            dist.broadcast(packed, group=pp_group, group_src=stage)
        yield bucket, packed


def _plan(mine: dict[str, Tensor], pp_group: Group) -> list[list[_Shard]]:
    """The shards each stage sends. A tied embedding stands on two stages: the first one that has it sends it."""
    local = [_Shard(name, tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()]
    stages = [local]
    if _size(pp_group) > 1:
        stages = [None] * _size(pp_group)
        dist.all_gather_object(stages, local, group=pp_group)
    seen = set()
    return [[shard for shard in shards if not (shard.name in seen or seen.add(shard.name))] for shards in stages]


def _buckets(shards: list[_Shard], limit: int) -> Iterator[list[_Shard]]:
    """Runs of shards of at most `limit` bytes; a larger shard is a bucket of its own."""
    bucket, filled = [], 0
    for shard in shards:
        if bucket and filled + shard.room > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(shard)
        filled += shard.room
    if bucket:
        yield bucket


def _pack(bucket: list[_Shard], tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    """The bucket's shards as bytes, uint8 [bucket]."""
    packed, start = torch.empty(sum(shard.room for shard in bucket), dtype=torch.uint8, device=device), 0
    for shard in bucket:
        packed[start : start + shard.nbytes].view(shard.dtype).view(shard.shape).copy_(tensors[shard.name])
        start += shard.room
    return packed


def _all_gather(packed: Tensor, tp_group: Group) -> Tensor:
    """uint8 [bucket] -> [tp, bucket]."""
    if _size(tp_group) == 1:
        return packed[None]
    gathered = packed.new_empty(_size(tp_group) * len(packed))  # flat: gloo refuses an output of more dimensions than the input
    dist.all_gather_into_tensor(gathered, packed, group=tp_group)
    return gathered.view(-1, len(packed))


def _unpack(bucket: list[_Shard], gathered: Tensor, table: Table) -> Iterator[tuple[str, Tensor]]:
    """Full tensors from uint8 [tp, bucket]."""
    start = 0
    for shard in bucket:
        pieces = [row[start : start + shard.nbytes].view(shard.dtype).view(shard.shape) for row in gathered]
        yield shard.name, table.unshard(shard.name, pieces)
        start += shard.room


def _size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)

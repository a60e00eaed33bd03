"""Ranks that are not there: Megatron's own groups and model as any rank of a world has them, in one process and without memory for weights.

torch's fake process group answers every collective at once, with nothing; parameters are on torch's meta device. For plans and rehearsals
on a machine without a GPU: torch.distributed must not be in use.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_nft.config import Config, ParallelConfig
from megatron_nft.policy import model, topology
from megatron_nft.policy.names import is_tied_copy, numbered
from megatron_nft.policy.topology import Topology
from megatron_nft.weights import table_for
from megatron_nft.weights.stream import Shard


@dataclass(frozen=True)
class Absent:
    """What a rank would hold."""

    topology: Topology
    shards: list[Shard]  # its parameters, as the weight stream tells of them
    parameters: int  # that it holds, a tied head's copy included
    written: int  # parameters that it writes into a checkpoint: those of which Megatron makes it the main replica


@contextmanager
def standing_in(parallel: ParallelConfig, rank: int, world: int) -> Iterator[Topology]:
    """Be `rank` of `world` for a while. replica_of_rank is empty: nobody is asked."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("torch.distributed is in use")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        topology.make_groups(parallel, create_gloo_process_groups=False)
        yield topology.place(parallel, ())
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def places(parallel: ParallelConfig, world: int) -> list[Topology]:
    """Of all ranks of a world, as Megatron deals them out."""
    found = []
    for rank in range(world):
        with standing_in(parallel, rank, world) as place:
            found.append(place)
    replicas = tuple(place.data_rank for place in found)
    return [replace(place, replica_of_rank=replicas) for place in found]


def held(config: Config, hf: dict, rank: int, world: int) -> Absent:
    """The model as a rank has it, in 16 bits as on a GPU (FP8 keeps its parameters so, too, when they are sent and saved)."""
    config = in_16_bits(config)
    with standing_in(config.parallel, rank, world) as place:
        from megatron.core import tensor_parallel

        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        with torch.device("meta"):
            modules = model.build(hf, config)
        first = place.expert_rank * table_for(hf).sizes.experts // place.expert_size
        named = list(numbered(modules, first))
        shards = [Shard(name, tuple(p.shape), p.dtype) for name, p in named if not is_tied_copy(name, modules[-1])]
        return Absent(place, shards, sum(p.numel() for _, p in named), _written(modules))


def in_16_bits(config: Config) -> Config:
    """A copy for a machine without a GPU, of the shapes that a GPU would hold."""
    other = copy.deepcopy(config)
    if other.model.precision == "auto":
        other.model.precision = "bf16"
    other.model.fp8, other.model.fp8_param_gather, other.model.first_last_layers_bf16 = None, False, False
    other.train.recompute_granularity = other.train.recompute_method = other.train.recompute_num_layers = None
    other.train.recompute_modules = None
    return other


def _written(modules: list) -> int:
    """Parameters of which this rank is the main replica."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    entries = [entry for module in modules for entry in nested_values(module.sharded_state_dict(metadata={}))]
    own = [entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_main_replica(entry.replica_id)]
    return sum(entry.data.numel() for entry in own)

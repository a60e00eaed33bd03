"""The buckets in which the trainer's weights go to the engines, and what a rank holds while they do."""

from dataclasses import dataclass

import torch

from megatron_nft.config import Config
from megatron_nft.planner import parameters
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.holdings import ITEMSIZE
from megatron_nft.weights.stream import Load, Ranks, Shard, plan

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Stream:
    """A pass over all weights."""

    buckets: list[Load]

    @property
    def bytes(self) -> int:
        """Of all full tensors."""
        return sum(load.nbytes for load in self.buckets)

    def stage_bytes(self, stage: int) -> int:
        """Of the full tensors that a stage sends."""
        return sum(load.nbytes for load in self.buckets if load.stage == stage)

    @property
    def peak(self) -> int:
        """Bytes on every rank: a bucket, the shards it is made of and, gathered, those of all ranks, and the bucket before it, of which
        vLLM keeps a layer's first tensors until it has them all."""
        before, most = 0, 0
        for load in self.buckets:
            gathered = load.sent * load.ranks.size if load.ranks.size > 1 else 0
            packed = load.sent if gathered or self._staged else 0
            most = max(most, before + load.nbytes + packed + gathered)
            before = load.nbytes
        return most

    @property
    def _staged(self) -> bool:
        return any(load.stage for load in self.buckets)


def stream(hf: dict, config: Config, layout: Layout) -> Stream:
    """As policy.weights() sends them: rollout.update_weights_bucket_megabytes, or a larger tensor alone."""
    table, dtype = parameters.table_of(hf), _DTYPES[ITEMSIZE[config.model.precision]]
    stages = []
    for stage in range(layout.pp):
        names = [parameter.name for chunk in parameters.chunks(hf, config, layout, stage) for parameter in chunk]
        own = names if layout.pp == 1 or not table.tied else [name for name in names if name != "output_layer.weight"]
        stages.append([Shard(name, table.shard_shape(name, _cut(name, layout)), dtype) for name in own])
    experts = Ranks(layout.etp * layout.ep, layout.ep, table.sizes.experts)
    return Stream(list(plan(stages, table, Ranks(layout.tp), experts, config.rollout.update_weights_bucket_megabytes * 2**20)))


def _cut(name: str, layout: Layout) -> int:
    return layout.tp if parameters.expert_number(name) is None else layout.etp

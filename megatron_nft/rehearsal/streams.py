"""What travels and what is written, from the shapes that Megatron itself gives ranks that are not there (policy/absent.py)."""

from dataclasses import dataclass

from megatron_nft.planner.plan import Plan
from megatron_nft.planner.saves import parameter_bytes
from megatron_nft.planner.weight_stream import Stream
from megatron_nft.policy.absent import Absent, held
from megatron_nft.policy.topology import Topology
from megatron_nft.weights import table_for
from megatron_nft.weights.stream import Ranks, Shard, plan


@dataclass(frozen=True)
class Streamed:
    """A weight sync."""

    stages: list[dict[str, int]]  # of each pipeline stage: buckets, bytes that one of its ranks sends, bytes of the full tensors
    peak: int  # bytes on every rank, the bucket before included, of which vLLM may keep tensors

    @property
    def nbytes(self) -> int:
        """Of all full tensors."""
        return sum(stage["full"] for stage in self.stages)


@dataclass(frozen=True)
class Written:
    """A checkpoint."""

    files: dict[int, int]  # bytes by the rank that writes them; ranks that write nothing are left out
    parameters: int  # of the whole model, each counted once


def ranks_of_stages(given: Plan, places: list[Topology]) -> list[Absent]:
    """The ranks of the first replica, stage after stage: they hold all there is, and write the checkpoint; and the world's last rank, which
    is to write nothing where there are more replicas."""
    first = [p for p in places if p.data_rank == 0 and p.context_rank == 0 and p.expert_rank == 0]
    chosen = dict.fromkeys([*(p.rank for p in first), *_holders_of_experts(given, places), len(places) - 1])
    return [held(given.config, given.hf, rank, len(places)) for rank in chosen]


def _holders_of_experts(given: Plan, places: list[Topology]) -> list[int]:
    """One rank for each other share of the experts of a stage."""
    found = {(p.pipeline_rank, p.expert_rank, p.expert_tensor_rank): p.rank for p in reversed(places)}
    return sorted(found.values()) if table_for(given.hf).sizes.experts else []


def sync(given: Plan, ranks: list[Absent]) -> Streamed:
    """The buckets of weights/stream.py, from what a rank of each stage holds."""
    layout, table = given.layout, table_for(given.hf)
    stages = [_named(ranks, stage) for stage in range(layout.pp)]
    experts = Ranks(layout.etp * layout.ep, layout.ep, table.sizes.experts)
    limit = given.config.rollout.update_weights_bucket_megabytes * 2**20
    loads = Stream(list(plan(stages, table, Ranks(layout.tp), experts, limit)))
    rows = [[load for load in loads.buckets if load.stage == stage] for stage in range(layout.pp)]
    return Streamed([{"buckets": len(own), "sent": sum(load.sent for load in own), "full": sum(load.nbytes for load in own)}
                     for own in rows], loads.peak)  # fmt: skip


def _named(ranks: list[Absent], stage: int) -> list[Shard]:
    """Under the table's names, as the stream tells the stages of them."""
    return next(rank.shards for rank in ranks if rank.topology.pipeline_rank == stage)


def checkpoint(given: Plan, ranks: list[Absent]) -> Written:
    """Files by rank: weights, and the optimizer's parameters and moments."""
    each = sum(parameter_bytes(given.config).values())
    return Written({rank.topology.rank: each * rank.written for rank in ranks if rank.written}, sum(rank.written for rank in ranks))

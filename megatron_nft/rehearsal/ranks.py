"""The rank map: Megatron's place of every rank beside its vLLM engine and its host."""

from dataclasses import dataclass
from itertools import groupby

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster
from megatron_nft.policy.topology import Topology


@dataclass(frozen=True)
class Rank:
    """A rank of the trainers. engine is None where the engines are servers."""

    rank: int
    host: int  # number of the node
    gpu: int  # of the node's
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    engine: int | None
    engine_tp: int | None


def rank_map(config: Config, cluster: Cluster, places: list[Topology]) -> list[Rank]:
    """Ranks are dealt to nodes in order, as srun and torchrun do; engines to ranks as rollout/engine.py has it."""
    size, colocated = config.rollout.tensor_parallel_size, config.rollout.mode == "colocated"
    return [
        Rank(
            p.rank, *divmod(p.rank, cluster.gpus_per_node), p.tensor_rank, p.context_rank, p.data_rank, p.pipeline_rank, p.expert_rank,
            *(divmod(p.rank, size) if colocated else (None, None)),
        )
        for p in places
    ]  # fmt: skip


def lines(ranks: list[Rank]) -> list[list[str]]:
    """A row for each run of tensor-parallel ranks of a node."""
    rows = [["ranks", "node", "GPUs", "TP", "CP", "DP", "PP", "vLLM engines", "their TP"]]
    for _, run in groupby(ranks, key=lambda r: (r.host, r.cp, r.dp, r.pp)):
        own = list(run)
        columns = [[getattr(r, name) for r in own] for name in ("rank", "host", "gpu", "tp", "cp", "dp", "pp", "engine", "engine_tp")]
        rows.append([_span(column) for column in columns])
    return rows


def crossing(ranks: list[Rank], config: Config) -> list[str]:
    """Groups that talk much and stand on more than one node, in words."""
    found = []
    for name, key in (("tensor", lambda r: (r.cp, r.dp, r.pp)), ("context", lambda r: (r.tp, r.dp, r.pp)), ("vLLM", lambda r: r.engine)):
        groups: dict = {}
        for rank in ranks:
            groups.setdefault(key(rank), set()).add(rank.host)
        if name == "vLLM" and config.rollout.mode != "colocated":
            continue
        if crossing := sum(len(hosts) > 1 for hosts in groups.values()):
            found.append(f"{crossing} of {len(groups)} {name} groups cross nodes")
    return found


def _span(values: list[int | None]) -> str:
    if values[0] is None:
        return "servers"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"

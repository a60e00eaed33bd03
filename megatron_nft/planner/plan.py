"""The plan of one config: its memory, its times, its checkpoints, and whether it fits."""

from dataclasses import asdict, dataclass

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.planner.memory import Memory, memory
from megatron_nft.planner.models import Model
from megatron_nft.planner.places import check
from megatron_nft.planner.saves import Saves
from megatron_nft.planner.times import Times, times

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """An estimate, from settings and config.json alone."""

    config: Config
    hf: dict  # the model's config.json
    model: str  # in words, where that is from
    cluster: Cluster
    layout: Layout
    memory: Memory
    times: Times
    saves: Saves
    reasons: list[str]  # each says what does not fit, and by how much; none: all fits

    @property
    def fits(self) -> bool:
        """Whether the run would go through without running out of memory."""
        return not self.reasons

    def as_dict(self) -> dict:
        """All numbers, fit for JSON. Bytes and seconds."""
        own = self.memory
        return {
            "estimate": True,
            "achieved": self.cluster.gpu.achieved.source,
            "model": self.model,
            "cluster": asdict(self.cluster),
            "layout": asdict(self.layout) | {"rollout_tensor_parallel_size": self.config.rollout.tensor_parallel_size},
            "fits": self.fits,
            "reasons": self.reasons,
            "memory": asdict(own) | {"headroom": {phase: own.limit - sum(parts.values()) for phase, parts in own.phases.items()}},
            "times": asdict(self.times),
            "saves": asdict(self.saves),
        }


def plan(config: Config, hf: dict | None = None) -> Plan:
    """Reckon with a config on config.plan's cluster. hf: the model's config.json; None: that of config.model.path, or of the published
    model of that name.

    Raises UserError as `check` does, and for a layout that does not suit the model.
    """
    model = check(config) if hf is None else Model(hf, config.model.path)
    cluster = Cluster.of(config)
    return completed(config, model, cluster, memory(config, model.hf, cluster))


def completed(config: Config, model: Model, cluster: Cluster, held: Memory) -> Plan:
    """The plan of a config whose memory is known."""
    layout, spent = Layout.of(config, cluster), times(config, model.hf, cluster, held)
    saves = Saves.of(config, model.hf, layout, spent.steps, spent.stall)
    return Plan(config, model.hf, model.told, cluster, layout, held, spent, saves, shortages(config, held))


def shortages(config: Config, held: Memory) -> list[str]:
    """What does not fit, and by how much, the worst first."""
    found = [
        f"{'the servers' if phase == 'servers' else phase} needs {gib(held.limit + too_many)} GiB of {gib(held.limit)} on the fullest GPU, "
        f"{gib(too_many)} too many"
        for phase, too_many in sorted(held.over.items(), key=lambda item: -item[1])
    ]
    if held.kv_tokens < held.window:
        found.append(f"the KV cache of an engine holds {held.kv_tokens:,} tokens, the longest prompt with its answer {held.window:,}")
    if not found and held.longest_response < config.rollout.max_tokens:
        found.append(
            f"the longest response that fits has {held.longest_response:,} tokens, rollout.max_tokens is {config.rollout.max_tokens:,}"
        )
    return found


def gib(nbytes: float) -> str:
    """Without its unit."""
    return f"{nbytes / GIB:.1f}"

"""Seconds of a rollout step, phase by phase."""

from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.memory import Memory


@dataclass(frozen=True)
class Times:
    """phases: seconds of a rollout step in "generate", "rewards", "old_logprobs", "train", "sync", "save" (its stall, a step's share) and "other";
    their sum is `step` where colocated, the longer of both sides where served. parts: of a phase the seconds of what it is made of, e.g.
    {"train": {"matrix products": ..., "attention": ..., "bubble": ..., "exposed communication": ...}}. facts: further numbers by name."""

    phases: dict[str, float]
    parts: dict[str, dict[str, float]]
    facts: dict[str, float]
    step: float
    tokens_per_gpu: float  # sampled tokens a second and GPU of the whole allocation, those thrown away included; trained ones are in facts
    gpu_hours: float  # of the whole run
    days: float


def times(config: Config, hf: dict, cluster: Cluster, memory: Memory) -> Times:
    """hf: the model's config.json; memory: that of the same config, whose KV cache bounds how many answers run at a time."""
    raise NotImplementedError

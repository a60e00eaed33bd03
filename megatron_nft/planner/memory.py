"""Bytes of the fullest GPU, phase by phase."""

from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster

PHASES = ("generate", "old_logprobs", "train", "sync", "save")


@dataclass(frozen=True)
class Memory:
    """phases: of every phase the bytes of each part on the fullest GPU, named in words that a chart can print ("weights", "gradients",
    "optimizer", "activations", "log-prob chunks", "NCCL and CUDA", "vLLM weights", "KV cache", "CUDA graphs" ...). Served mode: the
    trainers' GPUs; servers: the servers' own."""

    phases: dict[str, dict[str, int]]
    servers: dict[str, int]  # empty where colocated
    host: dict[str, int]  # bytes of a node's memory: what is offloaded, staged for a save, pinned
    limit: int  # bytes of a GPU that can be used
    kv_tokens: int  # that fit into an engine's KV cache
    largest_micro_batch: int  # tokens per rank; 0: none fits
    longest_response: int  # tokens that both the engine and the trainer hold; 0: none

    @property
    def fits(self) -> bool:
        """In every phase."""
        raise NotImplementedError


def memory(config: Config, hf: dict, cluster: Cluster) -> Memory:
    """hf: the model's config.json. Raises UserError for a layout that does not suit the model."""
    raise NotImplementedError

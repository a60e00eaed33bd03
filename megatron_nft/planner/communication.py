"""Seconds of collectives, by who takes part: GPUs of one node over NVLink, others over the network."""

from dataclasses import dataclass

from megatron_nft.planner.cluster import Cluster

LATENCY = {"nvlink": 12e-6, "network": 25e-6}  # seconds of a small collective (nccl-tests), and of a message to the next stage


@dataclass(frozen=True)
class Group:
    """Ranks `stride` apart, `size` of them."""

    size: int
    stride: int
    cluster: Cluster

    @property
    def local(self) -> int:
        """Its ranks on one node."""
        return max(1, min(self.size, self.cluster.gpus_per_node // self.stride))

    @property
    def rate(self) -> float:
        """Bytes a second and rank. A ring over several nodes crosses each node's border by the adapters of its ranks there."""
        gpu = self.cluster.gpu
        inside = gpu.nvlink * gpu.achieved.nvlink
        return inside if self.local == self.size else min(inside, gpu.network * gpu.achieved.network * self.local)

    @property
    def latency(self) -> float:
        """Seconds of the smallest collective: a ring's grow with the nodes, in a tree's way."""
        if self.local == self.size:
            return LATENCY["nvlink"]
        return LATENCY["network"] * max(1, (self.size // self.local).bit_length())

    def gather(self, nbytes: float) -> float:
        """All-gather to, or reduce-scatter of, `nbytes` on every rank."""
        return 0.0 if self.size == 1 else nbytes * (self.size - 1) / self.size / self.rate + self.latency

    def all_reduce(self, nbytes: float) -> float:
        """Of `nbytes` on every rank."""
        return 2 * self.gather(nbytes)

    def send(self, nbytes: float) -> float:
        """To the next rank of the group."""
        if self.size == 1:
            return 0.0
        gpu = self.cluster.gpu
        near = self.local == self.size
        rate = gpu.nvlink * gpu.achieved.nvlink if near else gpu.network * gpu.achieved.network
        return nbytes / rate + LATENCY["nvlink" if near else "network"]

"""All that touches Megatron-Core. It is imported when a Policy is made, not when this package is."""

from megatron_nft.policy.checks import check, check_chip
from megatron_nft.policy.exhausted import memory_told
from megatron_nft.policy.machine import check as check_machine
from megatron_nft.policy.machine import device_name
from megatron_nft.policy.memory import PeakMemory
from megatron_nft.policy.model import kernels
from megatron_nft.policy.policy import Policy
from megatron_nft.policy.profiling import Profiler, check_profiled_ranks
from megatron_nft.policy.selfcheck import checksums, token_logprobs
from megatron_nft.policy.settings import precision_of
from megatron_nft.policy.topology import Topology, gathered, hosts, initialize, shutdown, start_distributed, world_size
from megatron_nft.policy.watch import Watch

__all__ = [
    "PeakMemory",
    "Policy",
    "Profiler",
    "Topology",
    "Watch",
    "check",
    "check_chip",
    "check_machine",
    "check_profiled_ranks",
    "checksums",
    "device_name",
    "gathered",
    "hosts",
    "initialize",
    "kernels",
    "memory_told",
    "precision_of",
    "shutdown",
    "start_distributed",
    "token_logprobs",
    "world_size",
]

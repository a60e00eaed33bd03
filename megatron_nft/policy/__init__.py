"""All that touches Megatron-Core. It is imported when a Policy is made, not when this package is."""

from megatron_nft.policy.policy import Policy
from megatron_nft.policy.topology import Topology, initialize, shutdown

__all__ = ["Policy", "Topology", "initialize", "shutdown"]

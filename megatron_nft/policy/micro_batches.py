"""How long micro-batches are and who has how many: what batching.plan is told of the model and its ranks."""

import math

from megatron_nft import flops
from megatron_nft.batching import LENGTH_MULTIPLE, Layout
from megatron_nft.config import Config
from megatron_nft.policy import versions
from megatron_nft.policy.topology import Topology


def layout(config: Config, hf: dict, topology: Topology, prompts_per_update: int) -> Layout:
    """How mini-batches of so many groups are laid out for a model (its config.json) on these ranks."""
    side = versions.fp8_side(config.model.fp8_recipe) if config.model.fp8 else 1  # of a rank's part of a micro-batch
    cut = topology.context_size * (topology.tensor_size if config.parallel.sequence_parallel else 1)
    return Layout(
        data_parallel_size=topology.data_size,
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        prompts_per_update=prompts_per_update,
        attention_cost=flops.attention_cost(hf),
        length_multiple=math.lcm(LENGTH_MULTIPLE, topology.sequence_multiple, side * cut),
        count_multiple=topology.micro_batch_multiple,
        sequence_multiple=topology.sequence_multiple,
    )

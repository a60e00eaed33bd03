"""Published models, and settings to plan them with."""

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.memory import Memory, memory
from tests.unit.planner.holdings_worker import configured

QWEN_32B = {  # Qwen/Qwen2.5-32B's config.json
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
QWEN_7B = QWEN_32B | {  # Qwen/Qwen2.5-Math-7B's
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
}
QWEN_30B_A3B = {  # Qwen/Qwen3-30B-A3B's
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
LLAMA_8B = {  # meta-llama/Meta-Llama-3-8B's
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
GPT = QWEN_32B | {  # an MLP of three matrices with as many inner values as the two of four times the hidden size
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
}
TP8 = {"parallel.tensor_model_parallel_size": 8, "parallel.sequence_parallel": True}
TP4_PP2_CP2 = {
    "parallel.tensor_model_parallel_size": 4,
    "parallel.sequence_parallel": True,
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.context_parallel_size": 2,
}
LONG = {"rollout.max_tokens": 16384, "data.max_prompt_length": 2048, "train.tokens_per_micro_batch": 18432}


def settings(nodes: int = 16, **more) -> Config:
    """Long answers of a 32B run; more: settings by their dotted keys."""
    return configured({"plan.nodes": nodes, "train.recompute_granularity": "full", "rollout.tensor_parallel_size": 4, **LONG, **more})


def planned(hf: dict = QWEN_32B, nodes: int = 16, **more) -> Memory:
    """What memory() says of a model on so many nodes of eight H100."""
    config = settings(nodes, **more)
    return memory(config, hf, Cluster.of(config))


def used(found: Memory, phase: str) -> int:
    """Bytes of a phase."""
    return sum(found.phases[phase].values())

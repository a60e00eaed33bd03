"""A vLLM engine's bytes against closed forms and its own logs."""

from math import prod

import pytest

from megatron_nft.planner import engine_memory, parameters
from megatron_nft.planner.hardware import GIB
from megatron_nft.weights import table_for
from tests.unit.planner.published import LLAMA_8B, QWEN_7B, QWEN_30B_A3B, QWEN_32B, TP8, planned, settings


@pytest.mark.parametrize(
    "more, nbytes",
    [
        ({"rollout.tensor_parallel_size": 1}, 262_144),  # 32 GiB for 131,072 tokens, as published for QwQ-32B, the same architecture
        ({"rollout.tensor_parallel_size": 4}, 65_536),
        ({"rollout.tensor_parallel_size": 4, "rollout.kv_cache_dtype": "fp8"}, 32_768),
        ({"rollout.tensor_parallel_size": 40 // 5}, 32_768),
    ],
)
def test_bytes_of_a_cached_token(more, nbytes):
    assert engine_memory.token_bytes(QWEN_32B, settings(**more)) == nbytes


def test_key_value_heads_are_repeated_on_more_gpus_than_there_are_heads():
    four, eight = (engine_memory.token_bytes(QWEN_30B_A3B, settings(**{"rollout.tensor_parallel_size": tp})) for tp in (4, 8))
    assert four == eight == 2 * 48 * 128 * 2


@pytest.mark.parametrize("hf", [QWEN_32B, QWEN_7B, QWEN_30B_A3B])
def test_weights_of_an_engine(hf):
    """All of them in bf16 on one GPU (these vocabularies are multiples of 64); in FP8 half of the linear layers'."""
    alone = {"rollout.tensor_parallel_size": 1}
    linear = sum(prod(shape) for name, shape in table_for(hf).hf_shapes().items() if name.endswith("proj.weight"))
    assert engine_memory.weights(hf, settings(**alone)) == 2 * parameters.total(hf)
    assert engine_memory.weights(hf, settings(**alone, **{"rollout.quantization": "fp8"})) == 2 * parameters.total(hf) - linear


@pytest.mark.parametrize(
    "hf, tp, logged",
    [(LLAMA_8B, 1, 14.96), (LLAMA_8B, 2, 7.48), (QWEN_32B, 2, 30.71)],  # vllm-project/vllm: pull request 10511, issue 15815
)
def test_weights_are_what_vllm_logs(hf, tp, logged):
    """In GiB: "model weights take", which has what the allocator rounds up in it."""
    found = engine_memory.weights(hf, settings(**{"rollout.tensor_parallel_size": tp})) / GIB
    assert 0.993 * logged < found < logged + 0.005


def test_blocks_are_what_vllm_logs():
    """vllm-project/vllm issue 15815: Qwen2.5-32B on two GPUs, 7.71 GiB for the KV cache, 3947 blocks of 16 tokens."""
    block = 16 * engine_memory.token_bytes(QWEN_32B, settings(**{"rollout.tensor_parallel_size": 2}))
    assert 7.705 * GIB // block <= 3947 <= 7.715 * GIB // block


def test_an_engine_has_its_share_of_the_gpu():
    found = planned(**TP8, **{"rollout.gpu_memory_utilization": 0.6})
    parts = {name: nbytes for name, nbytes in found.phases["generate"].items() if name not in ("weights", "optimizer", "NCCL and CUDA")}
    assert sum(parts.values()) == pytest.approx(0.6 * found.limit, abs=16 * 65_536)
    assert found.kv_tokens * 65_536 == parts["KV cache"] and found.kv_tokens % 16 == 0
    assert planned(**TP8, **{"rollout.enforce_eager": True}).kv_tokens - planned(**TP8).kv_tokens == GIB // 65_536

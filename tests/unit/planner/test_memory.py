"""Bytes of phases, hosts and checkpoints; the largest micro-batch and the longest response; what is refused."""

import dataclasses

import pytest

from megatron_nft.errors import UserError
from megatron_nft.planner import parameters
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.planner.hardware import GIB
from megatron_nft.planner.holdings import Stage
from megatron_nft.planner.memory import PHASES, memory
from megatron_nft.planner.weight_stream import stream
from tests.unit.planner.published import QWEN_7B, QWEN_30B_A3B, QWEN_32B, TP4_PP2_CP2, TP8, planned, settings, used


def test_what_leaves_the_gpu_is_not_there_while_answers_are_written():
    parts = {
        level: {"weights", "gradients", "optimizer"} & planned(**TP8, **{"train.offload": level}).phases["generate"].keys()
        for level in ("none", "gradients", "optimizer", "all", None)
    }
    assert parts["none"] == {"weights", "gradients", "optimizer"}
    assert parts["gradients"] == parts[None] == {"weights", "optimizer"}
    assert parts["optimizer"] == {"weights"} and parts["all"] == set()


def test_what_is_offloaded_lies_on_the_host():
    train = planned(**TP8).phases["train"]
    assert "offloaded" not in planned(**TP8).host
    assert planned(**TP8, **{"train.offload": "optimizer"}).host["offloaded"] == 8 * train["optimizer"]
    assert planned(**TP8, **{"train.offload": "all"}).host["offloaded"] == 8 * (train["optimizer"] + train["weights"])


def test_a_save_is_staged_whole_on_every_rank():
    """float32 weights and moments, and the bf16 weights."""
    found = planned(**TP8)
    assert found.host["staged for a save"] == 8 * 14 * found.phases["train"]["weights"] // 2


def test_a_stage_without_buckets_is_gathered_at_once_for_a_save():
    """Megatron cuts only the first stage's buffer into buckets."""
    stages = Stage.all(QWEN_32B, settings(), Layout(4, 2, 2, 8, 1, 1, 4, True))
    gathered = planned(**TP4_PP2_CP2).phases["save"]["gathered for the save"]
    assert gathered == 4 * stages[1].numel * (1 + 1 / 16)
    assert planned(**TP8).phases["save"]["gathered for the save"] < 2 * GIB


def test_the_stream_holds_the_largest_tensor():
    """The embedding, its slices gathered, and one rank's slice."""
    config = settings(**TP8)
    found = stream(QWEN_32B, config, Layout(8, 1, 1, 16, 1, 1, 8, True))
    largest = 2 * 152064 * 5120
    assert found.bytes == 2 * parameters.total(QWEN_32B)
    assert 2 * largest + largest // 8 <= found.peak <= 2 * largest + largest // 8 + largest


def test_the_largest_micro_batch_is_the_largest():
    found = planned(**TP8, **{"train.recompute_granularity": None})
    assert found.largest_micro_batch >= 18432 and used(found, "train") <= found.limit
    fits = planned(**TP8, **{"train.recompute_granularity": None, "train.tokens_per_micro_batch": found.largest_micro_batch})
    above = planned(**TP8, **{"train.recompute_granularity": None, "train.tokens_per_micro_batch": found.largest_micro_batch + 128})
    assert not {"train", "old_logprobs"} & fits.over.keys()
    assert above.over.keys() >= {"train"}


def test_the_longest_response():
    tight = planned(**TP8, **{"train.recompute_granularity": None})
    assert tight.longest_response == tight.largest_micro_batch - 2048
    small = planned(QWEN_7B, 4, **{"rollout.tensor_parallel_size": 1, "rollout.gpu_memory_utilization": 0.4})
    assert small.longest_response == 4096 - 2048  # the model's window


def test_it_fits_or_it_does_not():
    assert planned(**TP8, **{"rollout.gpu_memory_utilization": 0.6}).fits
    alone = planned(nodes=1, **{"rollout.gpu_memory_utilization": 0.9})  # 32B without parallelism
    assert not alone.fits and alone.over.keys() == set(PHASES)
    assert alone.largest_micro_batch == alone.longest_response == 0
    starved = planned(**TP8, **{"rollout.gpu_memory_utilization": 0.24})
    assert not starved.over and starved.kv_tokens < starved.window and not starved.fits


def test_servers_have_gpus_of_their_own():
    served = {"rollout.mode": "served", "rollout.gpu_memory_utilization": 0.85}
    config = settings(**TP8, **served)
    config.rollout.served.count = 8
    found = memory(config, QWEN_32B, Cluster.of(config))
    assert not any(name.startswith(("vLLM", "KV")) for parts in found.phases.values() for name in parts)
    assert found.servers["KV cache"] == found.kv_tokens * 65_536 and planned(**TP8).servers == {}
    assert used(found, "generate") < used(planned(**TP8), "generate")


@pytest.mark.parametrize("hf, more", [(QWEN_30B_A3B, {}), (QWEN_30B_A3B, {"rollout.tensor_parallel_size": 8}), (QWEN_7B, {})])
def test_more_models_are_planned(hf, more):
    experts = {"parallel.expert_model_parallel_size": 8, "parallel.expert_tensor_parallel_size": 1} if "num_experts" in hf else {}
    found = planned(hf, 2, **{**TP8, "parallel.tensor_model_parallel_size": 4}, **experts, **more)
    assert found.phases.keys() == set(PHASES)
    assert all(isinstance(nbytes, int) and nbytes > 0 for parts in found.phases.values() for nbytes in parts.values())


@pytest.mark.parametrize(
    "more, said",
    [
        ({"parallel.tensor_model_parallel_size": 16, "parallel.sequence_parallel": True}, r"attention heads \(40\)"),
        ({"parallel.pipeline_model_parallel_size": 3}, "16|128"),
        ({"parallel.pipeline_model_parallel_size": 4, "parallel.virtual_pipeline_model_parallel_size": 32}, r"layers \(64\)"),
        ({"parallel.expert_model_parallel_size": 2}, "no experts"),
        ({"rollout.tensor_parallel_size": 16}, r"attention heads \(40\).*rollout.tensor_parallel_size"),
        ({**TP8, "train.tokens_per_micro_batch": 18433}, "train.tokens_per_micro_batch"),
        ({"megatron.transformer": {"num_layers_in_first_pipeline_stage": 3}}, "num_layers_in_first_pipeline_stage"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_in_a_line(more, said):
    with pytest.raises(UserError, match=said) as caught:
        planned(**more)
    assert "\n" not in str(caught.value)


def test_memory_is_of_plain_values():
    assert all(isinstance(value, (int, float)) for value in planned(**TP8).facts.values())
    assert dataclasses.asdict(planned(**TP8))["limit"] == int(0.988 * 80 * GIB)

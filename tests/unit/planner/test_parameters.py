"""Weights, gradients and optimizer of published models against closed forms; against Megatron on tiny ones: test_holdings."""

from math import lcm

import numpy as np
import pytest

from megatron_nft.planner import parameters
from megatron_nft.planner.buffers import Buffer
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.holdings import Stage
from megatron_nft.planner.parameters import Parameter
from tests.unit.planner.published import QWEN_7B, QWEN_30B_A3B, QWEN_32B, TP8, planned, settings


@pytest.mark.parametrize("hf, published", [(QWEN_32B, 32_763_876_352), (QWEN_7B, 7_615_616_512), (QWEN_30B_A3B, 30_532_122_624)])
def test_parameters_are_those_of_the_published_files(hf, published):
    """total_size / 2 in model.safetensors.index.json."""
    assert parameters.total(hf) == published


def test_32b_over_8_x_16_gpus():
    """Every size is a multiple of a bucket's 128: no padding, so that each rank owns a sixteenth of every bucket."""
    layer = 5120 * (5120 + 2 * 1024) + 7168 + 5120 * 5120 + 3 * 27648 * 5120
    rank = (64 * layer + 2 * 152064 * 5120) // 8 + (2 * 64 + 1) * 5120
    train = planned(**TP8).phases["train"]
    assert (train["weights"], train["gradients"], train["optimizer"]) == (2 * rank, 4 * rank, 12 * rank // 16)
    assert [round(train[part] / 1e9, 1) for part in ("weights", "gradients", "optimizer")] == [8.2, 16.4, 3.1]


@pytest.mark.parametrize(
    "more, weights, state",
    [
        ({}, 6, 12),  # bf16 weights and fp32 gradients, of the distributed optimizer's documentation in Megatron Core's guide
        ({"model.precision": "fp32"}, 8, 8),
        ({"megatron.ddp": {"grad_reduce_in_fp32": False}}, 4, 12),
        ({"optimizer.use_precision_aware_optimizer": True}, 6, 2 + 4 + 4),
        ({"optimizer.use_precision_aware_optimizer": True, "optimizer.exp_avg_dtype": "bf16", "optimizer.exp_avg_sq_dtype": "fp8"}, 6, 5),
        ({"optimizer.use_precision_aware_optimizer": True, "megatron.optimizer": {"store_param_remainders": False}}, 6, 12),
    ],
)
def test_bytes_of_a_parameter(more, weights, state):
    config, layout = settings(**more), Layout(8, 1, 1, 16, 1, 1, 8, True)
    [stage] = Stage.all(QWEN_32B, config, layout)
    held = stage.fullest
    assert (held.weights + held.gradients, held.optimizer) == (weights * stage.numel, state * stage.numel // 16)


def test_fp8_parameters_have_a_byte():
    config = settings(**{"model.fp8": "hybrid", "model.fp8_param_gather": True, "model.first_last_layers_bf16": True})
    [stage] = Stage.all(QWEN_32B, config, Layout(8, 1, 1, 16, 1, 1, 8, True))
    linear = 62 * (5120 * 2 * (5120 + 1024) + 3 * 27648 * 5120) // 8  # of all layers but the first and last
    assert stage.fullest.weights == 2 * stage.numel - linear
    assert stage.fullest.gradients == 4 * stage.numel


def test_experts_lie_on_few_ranks():
    layout = Layout(4, 1, 1, 4, 1, 8, 1, True)
    [stage] = Stage.all(QWEN_30B_A3B, settings(), layout)
    experts = 48 * 16 * 3 * 768 * 2048
    assert sum(p.numel for [*chunk] in stage.chunks for p in chunk if p.expert) == experts
    assert stage.fullest.optimizer == 12 * experts // 2 + 12 * (stage.numel - experts) // 4  # two ranks share an expert, four the rest


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_all_ranks_are_the_whole(seed):
    """Every element of every parameter has one owner, however the buckets are cut."""
    random = np.random.default_rng(seed)
    held = tuple(Parameter(str(n), int(size), alone=n in (3, 7)) for n, size in enumerate(random.integers(1, 900, 12)))
    buffer = Buffer(held, ranks=int(random.integers(1, 9)), bucket_size=[None, 1000][seed % 2], itemsize=2, gradient_itemsize=4)
    pieces = [sum(buffer.pieces(rank)) for rank in range(buffer.ranks)]
    assert pieces == buffer.owned.tolist() and sum(pieces) == sum(parameter.numel for parameter in held)
    assert sum(buffer.buckets) == buffer.numel and not any(size % lcm(128, buffer.ranks) for size in buffer.buckets)


def test_state_on_the_host_leaves_the_gpu():
    on = {"optimizer.optimizer_cpu_offload": True, "optimizer.use_precision_aware_optimizer": True}
    here, there = planned(**TP8), planned(**TP8, **on)
    assert "optimizer" not in there.phases["train"]
    assert there.host["updated on the host"] == 8 * here.phases["train"]["optimizer"] * 16 // 12

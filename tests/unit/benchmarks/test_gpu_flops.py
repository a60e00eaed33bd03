"""The GPU benchmarks' count of operations."""

import sys

import pytest

from megatron_nft.flops import linear_flops
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import flops  # noqa: E402

HF = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}


def test_qwen_1_5b_has_the_weights_it_is_known_for():
    """1,543,714,304 in all: these, in each of 28 layers 2,048 biases and two norms of 1,536, and one norm; the head is the embedding."""
    assert linear_flops(HF) / 2 == 1543714304 - 28 * (2048 + 2 * 1536) - 1536


def test_operations_counted_by_hand():
    tiny = {
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 10,
    }
    layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k, v, output, MLP
    weights = 2 * layer + 40
    # one sequence of 3, one of 5: scores and values, 2 operations x L x L / 2 x width each, forward, and twice that backward
    attention = 2 * sum(3 * (2 + 2) * length * length / 2 * 4 for length in (3, 5))
    assert flops.training_flops(tiny, [3, 5]) == 6 * weights * 8 + attention
    assert flops.layer_flops(tiny, [3, 5]) == 6 * 2 * layer * 8 + attention


@pytest.mark.parametrize(
    ("device", "fp8", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", False, 989e12),
        ("NVIDIA H200", True, 1979e12),
        ("NVIDIA H20", False, 148e12),
        ("CPU", False, None),
        ("NVIDIA A100-SXM4-80GB", True, None),
    ],
)
def test_peaks(device, fp8, expected):
    assert flops.peak(device, fp8) == expected

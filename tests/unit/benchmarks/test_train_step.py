"""The GPU benchmark: its count of operations, and that the script runs, at a tiny size and on this machine's device."""

import json
import os
import subprocess
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


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/gpu/train_step.py", "--tiny", "--tokens", "128", "256", "--steps", "1", "--json", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    steps = [row for row in result["rows"] if "way" not in row]
    assert [row["tokens"] for row in steps] == [128, 256] and all(row["tokens_per_second"] > 0 for row in steps)
    assert {"one pass", "recomputing", "plain"} <= {row["way"] for row in result["rows"] if "way" in row}
    assert "train step               256 tokens" in done.stdout and result["device"] in result["kernels"]

"""The benchmark of the weight sync: its estimate counts every byte, and the script runs, at a tiny size."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import weights_plan  # noqa: E402


def test_the_plan_counts_every_byte_of_the_model():
    """Qwen2.5-32B has 32,763,876,352 parameters; all of its tensors are multiples of 16 bytes."""
    found = weights_plan.estimate(weights_plan.QWEN_32B, tp=8, pp=2, bucket_bytes=2**28)
    assert found["bytes of the model"] == 2 * 32_763_876_352


def test_stages_that_one_gpu_does_not_need():
    alone = weights_plan.estimate(weights_plan.QWEN_32B, tp=1, pp=1, bucket_bytes=2**28)
    assert alone["broadcast between pipeline stages"] == alone["gather over TP"] == 0 < alone["copies"]


def test_more_ranks_gather_more():
    two, eight = (weights_plan.estimate(weights_plan.QWEN_32B, tp, 2, 2**28) for tp in (2, 8))
    assert eight["gather over TP"] == pytest.approx(two["gather over TP"] * (7 / 8) / (1 / 2), rel=0.1)


def test_the_script_runs():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/weights.py", "--tiny", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("tiny: 26 tensors", "plain copy", "whole / (stream + reload)", "stages of the stream, two tensor-parallel ranks"):
        assert line in done.stdout, done.stdout
    assert "target" not in done.stdout, "targets are for models of real size"

"""Every GPU benchmark runs at its tiny size on this machine's device, through the code that a GPU runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

GPU = ROOT / "benchmarks" / "gpu"
pytestmark = pytest.mark.slow
starts_vllm = pytest.mark.skipif(os.environ.get("MEGATRON_NFT_LONG") != "1", reason="starts vLLM: make test-long")


def run(script: str, tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    """(the result as written, what was printed)."""
    output = tmp_path / "out.json"
    command = [sys.executable, f"benchmarks/gpu/{script}.py", "--tiny", "--json", str(output), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["benchmark"] == script and result["rows"] and not [row for row in result["rows"] if "error" in row]
    return result, done.stdout


def test_train_step(tmp_path):
    result, printed = run("train_step", tmp_path, "--profile", str(tmp_path / "profiles"))
    assert [row["tokens"] for row in result["rows"]] == [128, 256, 128, 256]  # in two precisions, one process
    for row in result["rows"]:
        parts = [row[f"{name}_seconds"] for name in ("layers", "head", "optimizer")]
        assert all(part > 0 for part in parts) and sum(parts) < row["seconds"] and row["layers_tflops"] > row["tflops"] > 0
    assert all(profile["kinds"]["matrix products"] > 0 for profile in result["profiles"].values()) and "matrix products" in printed
    assert sorted(path.suffix for path in (tmp_path / "profiles").iterdir()) == [".json", ".json", ".txt", ".txt"]


def test_logprobs(tmp_path):
    result, _ = run("logprobs", tmp_path)
    by_way = {row["way"]: row for row in result["rows"]}
    assert {"plain", "one pass", "recomputing", "one pass, chunks of 64"} <= set(by_way)
    for row in by_way.values():  # the same work
        for key in ("loss", "hidden_norm", "weight_norm"):
            assert row[key] == pytest.approx(by_way["plain"][key], rel=1e-4)


@starts_vllm
def test_mismatch(tmp_path):
    """In float32 trainer and engine agree to float32's precision; the engine's own prefill does as well."""
    result, _ = run("mismatch", tmp_path)
    assert {row["trainer"] for row in result["rows"]} == {"fp32", "the engine's prefill"}
    for row in result["rows"]:
        assert row["tokens"] >= 200 and 0 <= row["mean_absolute"] <= row["largest"] < 1e-3 and row["k3"] < 1e-6


@starts_vllm
def test_weight_stream(tmp_path):
    result, _ = run("weight_stream", tmp_path, "--repeats", "1")
    [row, *alone] = result["rows"]
    assert row["tensors"] == 26 and all(row[f"{name}_seconds"] > 0 for name in ("copy", "stream", "reload", "whole"))
    assert alone and all(one["stream_seconds"] > 0 for one in alone)
    assert any(ratio["name"].startswith("weight stream") and ratio["value"] > 0 for ratio in result["ratios"])

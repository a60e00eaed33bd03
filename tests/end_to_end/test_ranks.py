"""Whole training steps on two ranks, trainer and vLLM engines together, equal those on one rank."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from megatron_nft.policy.topology import host
from tests.end_to_end.test_engine import make_model
from tests.support import ROOT, add_tokenizer, run_ranks

SETTINGS = [
    "train.steps=1",
    "rollout.prompts_per_step=8",
    "train.prompts_per_update=4",
    "train.tokens_per_micro_batch=2048",
    "evaluation.sets.0.limit=12",
    "evaluation.k=2",
    "evaluation.interval=1",
    "rollout.cpu_kvcache_space=1",
    "optimizer.lr=0.03",  # with so large an adam_eps an update goes with the gradient: about 1e-3, and nothing hangs on the sign of zero
    "optimizer.adam_eps=0.01",
]


def train(run_dir: Path, ranks: int, *overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The rows of metrics.jsonl and the exported tensors."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_nft", "train", "examples/arithmetic/nft.yaml", f"run_dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *SETTINGS, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(run_dir / "huggingface" / "model.safetensors")


def sampled(run_dir: Path) -> list[dict]:
    """The rows of all engines' answers, in the order of training."""
    rows = [row for path in (run_dir / "rollouts").glob("step_*.parquet") for row in pyarrow.parquet.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: (row["position"], row["sample"]))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("single") / "run"
    return *train(run_dir, 1), sampled(run_dir)


PROFILE = ["profile.steps=[1]", "profile.ranks=[1]", "profile.stages=[old_logprobs,train]"]
LAYOUTS = {
    "two replicas, two engines": ["parallel.tensor_model_parallel_size=1", *PROFILE],
    "one TP2 model, one TP2 engine": ["parallel.tensor_model_parallel_size=2", "rollout.tensor_parallel_size=2"],
    "two stages, two engines": ["parallel.pipeline_model_parallel_size=2"],
}
if os.environ.get("MEGATRON_NFT_LONG") == "1":
    LAYOUTS["four engines"] = ["parallel.tensor_model_parallel_size=2"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(layout, single, tmp_path):
    """The same answers with their verdicts, log-probs to 1e-5, norms to 1e-4 relative, weights (which move by some 1e-3) to 2e-6; and what
    the new weights answer is the same."""
    rows, tensors = train(tmp_path / "run", 4 if layout == "four engines" else 2, *LAYOUTS[layout])
    expected_rows, expected, answers = single
    for name in ("correct_rate", "groups_decided", "groups_kept", "response_length"):
        assert rows[1][f"train/{name}"] == expected_rows[1][f"train/{name}"], name
    found = sampled(tmp_path / "run")
    assert [{**row, "logprobs": None} for row in found] == [{**row, "logprobs": None} for row in answers] and len(found) >= 8 * 8
    assert all(row["logprobs"] == pytest.approx(one["logprobs"], abs=1e-5, rel=0) for row, one in zip(found, answers))
    for name in ("grad_norm", "entropy", "negative_coefficient"):
        assert rows[1][f"train/{name}"] == pytest.approx(expected_rows[1][f"train/{name}"], rel=1e-4), name
    for name in expected:
        torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert [validation(row) for row in rows] == [validation(row) for row in expected_rows]
    start = load_file(ROOT / "examples/arithmetic/model/model.safetensors")
    assert max((expected[name] - start[name]).abs().max() for name in start) > 3e-4
    compare_balance(rows[1])
    if layout.startswith("two replicas"):
        compare_traces(tmp_path / "run" / "profile")
    if layout.endswith("two engines"):
        assert sorted(path.name for path in (tmp_path / "run" / "rollouts").glob("step_*")) == ["step_1-0.parquet", "step_1-1.parquet"]


def compare_balance(row: dict) -> None:
    """Every stage has its slowest rank, by name. Twice the mean of two would be a rank that did nothing."""
    for stage in ("generate", "batching", "old_logprobs", "train", "sync", "validate"):
        assert 1.0 <= row[f"balance/{stage}"] < 2.0, stage
        assert row[f"balance/{stage}_slowest"] in {f"rank {rank} on {host()}" for rank in range(8)}, stage


def compare_traces(folder: Path) -> None:
    """Of the second rank and of the stages asked for, with their names and the work in them."""
    found = {path.name: json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] for path in folder.iterdir()}
    assert set(found) == {f"step_1-rank1-{stage}.json.gz" for stage in ("old_logprobs", "train")}
    for stage in ("old_logprobs", "train"):
        names = {event.get("name") for event in found[f"step_1-rank1-{stage}.json.gz"]}
        assert {stage, "aten::mm"} <= names, stage


def validation(row: dict) -> dict:
    return {key: value for key, value in row.items() if key.startswith("validation/")}


def test_an_engine_goes_on_while_another_has_nothing_to_write(tmp_path):
    model = make_model(tmp_path / "model", seed=0)
    add_tokenizer(model)
    run_ranks(Path(__file__).with_name("alone_worker.py"), 2, {"model": str(model)}, tmp_path, timeout=300)

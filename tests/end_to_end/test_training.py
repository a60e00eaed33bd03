"""The program as a user runs it: the reward rises, a killed run goes on as if never killed, what it exports loads elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT

DEMO = ROOT / "examples" / "arithmetic"
SETTINGS = [
    "train.steps=8",
    "rollout.prompts_per_step=32",
    "optimizer.lr=1e-4",
    "checkpoint.interval=3",
    "evaluation.interval=4",
    "evaluation.k=1",
    "evaluation.sets.0.limit=64",
    "logging.wandb=offline",
]


def start(command: str, run_dir: Path, *overrides: str, log: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "megatron_nft", command, str(DEMO / "nft.yaml"), f"run_dir={run_dir}", *overrides]
    with log.open("a") as output:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def run(command: str, run_dir: Path, *overrides: str, log: Path) -> str:
    process = start(command, run_dir, *overrides, log=log)
    assert process.wait(timeout=500) == 0, log.read_text()[-4000:]
    return log.read_text()


def rows(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "timestamp" and not key.startswith(("time/", "memory/"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run from start to end, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", run("train", folder / "run", *SETTINGS, log=folder / "log")


def test_the_reward_rises(finished):
    """By at least 10 points in eight steps of two updates, from some 30 %."""
    rates = [row["train/correct_rate"] for row in rows(finished[0]) if row["step"] > 0]
    assert len(rates) == 8
    assert sum(rates[-2:]) / 2 > sum(rates[:2]) / 2 + 0.1


def test_the_run_directory_is_complete(finished):
    run_dir, printed = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "rollouts", "evaluations", "checkpoints", "huggingface", "report.html", "wandb"} <= names
    assert sorted(p.name for p in (run_dir / "rollouts").iterdir()) == [f"step_{n}.parquet" for n in range(1, 9)]
    assert sorted(p.name for p in (run_dir / "evaluations").iterdir()) == ["step_0.json", "step_4.json", "step_8.json"]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_6", "step_8"]  # keep: 2
    assert "heldout greedy" in printed and f"report: {run_dir / 'report.html'}" in printed
    assert "Warning" not in printed


def test_the_sampler_had_the_trainers_weights_at_every_step(finished):
    """Mean |log pi_sampler - log pi_trainer| of the sampled tokens: 1e-5 in float32."""
    differences = [row["train/logprob_difference"] for row in rows(finished[0]) if row["step"] > 0]
    assert 0 < max(differences) < 1e-5


def test_killed_and_resumed_equals_never_killed(finished, tmp_path):
    """Every number of every step, and every bit of the final weights."""
    run_dir = tmp_path / "run"
    process = start("train", run_dir, *SETTINGS, log=tmp_path / "log")
    while len(rows(run_dir)) < 6:  # steps 0 to 5: two steps after the checkpoint of step 3
        assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_3"]
    printed = run("train", run_dir, *SETTINGS, log=tmp_path / "log")
    assert "resumed after step 3" in printed
    assert [without_times(row) for row in rows(run_dir)] == [without_times(row) for row in rows(finished[0])]
    expected = load_file(finished[0] / "huggingface" / "model.safetensors")
    got = load_file(run_dir / "huggingface" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_export_loads_in_transformers_and_vllm(finished, tmp_path):
    exported = finished[0] / "huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is 10*2+10?"}], add_generation_prompt=True, return_tensors="pt")
    answer = tokenizer.decode(model.generate(chat["input_ids"], max_new_tokens=40, do_sample=False)[0])
    assert "\\boxed{" in answer
    settings = [f"model.path={exported}", "evaluation.sets.0.limit=64", "evaluation.k=1"]
    printed = run("evaluate", tmp_path, *settings, log=tmp_path / "log")
    result = json.loads((tmp_path / "evaluations" / "huggingface.json").read_text())
    last = [row for row in rows(finished[0]) if "validation/heldout/greedy" in row][-1]
    assert result["sets"]["heldout"]["greedy"] == last["validation/heldout/greedy"]
    assert "heldout" in printed

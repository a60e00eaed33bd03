"""The warm start as a user runs it: the loss falls, a stopped run goes on exactly, new settings count on resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import ROOT, load_example


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A fresh model and worked answers."""
    folder = tmp_path_factory.mktemp("sft")
    load_example("arithmetic/make_model.py").write(folder / "model", seed=1)
    make_data = load_example("arithmetic/make_data.py")
    lines = [json.dumps(row) for row in make_data.rows("train", 300, mixed=False)]
    (folder / "worked.jsonl").write_text("\n".join(lines))
    return folder


def sft(material: Path, run_dir: Path, steps: int, *overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The rows of metrics.jsonl and the exported tensors."""
    arguments = [f"run_dir={run_dir}", f"model.path={material / 'model'}", f"sft.data.0.path={material / 'worked.jsonl'}"]
    arguments += [f"sft.steps={steps}", "sft.sequences_per_update=32", "train.tokens_per_micro_batch=1024", "optimizer.lr_warmup_iters=3"]
    command = [sys.executable, "-m", "megatron_nft", "sft", str(ROOT / "examples/arithmetic/sft.yaml"), *arguments, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(run_dir / "huggingface" / "model.safetensors")


def test_the_warm_start(material, tmp_path):
    rows, tensors = sft(material, tmp_path / "whole", 12)
    assert rows[-1]["train/loss"] < 0.6 * rows[0]["train/loss"]
    assert [round(row["train/lr"] / 2e-3, 3) for row in rows[:4]] == [0.333, 0.667, 1.0, 1.0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "huggingface")
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])

    sft(material, tmp_path / "parts", 5)
    resumed_rows, resumed = sft(material, tmp_path / "parts", 12)
    assert [row["train/loss"] for row in resumed_rows] == [row["train/loss"] for row in rows]
    assert resumed.keys() == tensors.keys() and all(torch.equal(resumed[name], tensors[name]) for name in tensors)

    later_rows, _ = sft(material, tmp_path / "parts", 13, "optimizer.lr=1e-3")
    assert later_rows[-1]["train/lr"] == 1e-3 and len(later_rows) == 13

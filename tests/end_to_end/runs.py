"""Runs of the demo as a user starts them, and what makes two of them equal."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import psutil
import pyarrow.parquet
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

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

# groups and unfinished answers are carried from step to step
CARRIED = ["rollout.order=started", "rollout.max_staleness=1", "data.most_skipped=0.8"]
SMALL = [*SETTINGS, *CARRIED, "train.steps=5", "rollout.prompts_per_step=8", "train.prompts_per_update=4",
         "evaluation.interval=2", "evaluation.sets.0.limit=16", "rollout.cpu_kvcache_space=1", "logging.wandb=disabled"]  # fmt: skip


def start(command: str, run_dir: Path, *overrides: str, log: Path, at: dict | None = None, ranks: int = 1,
          config: Path = DEMO / "nft.yaml") -> subprocess.Popen:  # fmt: skip
    """A process that trains. at: a signal's moment, as at_stage.py takes it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    program = ["-m", "megatron_nft"] if at is None else [str(ROOT / "tests/end_to_end/at_stage.py"), json.dumps(at)]
    arguments = [sys.executable, *launcher, *program, command, str(config), f"run_dir={run_dir}", *overrides]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])}
    if ranks > 1:
        environment["OMP_NUM_THREADS"] = "1"
    with log.open("a") as output:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def run(command: str, run_dir: Path, *overrides: str, log: Path, code: int = 0, **more) -> str:
    """Run to the end, which must be the exit code `code`; returns all that was printed to the log."""
    process = start(command, run_dir, *overrides, log=log, **more)
    try:
        assert process.wait(timeout=1500) == code, log.read_text()[-4000:]
    finally:
        end(process)
    return log.read_text()


def end(process: subprocess.Popen) -> None:
    """Kill what is left of a run that a test gives up."""
    if process.poll() is None:
        for own in [*psutil.Process(process.pid).children(recursive=True), process]:
            own.kill()
        process.wait()


def survivors(run_dir: Path) -> list[str]:
    """Command lines of processes that still work on a run directory."""
    lines = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if f"run_dir={run_dir}" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            lines.append(" ".join(words))
    return lines


def rows(run_dir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def without_times(row: dict) -> dict:
    of_the_machine = ("time/", "memory/", "checkpoint/", "engine/", "balance/")
    return {key: value for key, value in row.items() if key != "timestamp" and not key.startswith(of_the_machine)}


def saved_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0 where there is none."""
    return max((int(file.parent.name.removeprefix("step_")) for file in run_dir.glob("checkpoints/step_*/manifest.json")), default=0)


def checkpoint_entries(directory: Path) -> dict:
    """Everything that a checkpoint holds: full tensors (parameters, moments), the generators of every rank, scheduler, step, cursor."""
    reader = torch.distributed.checkpoint.FileSystemReader(directory)
    stored = reader.read_metadata().state_dict_metadata.items()
    entries = {key: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else BytesIO() for key, entry in stored}
    torch.distributed.checkpoint.load(entries, storage_reader=reader, no_dist=True)
    entries["common"] = torch.load(directory / "common.pt", weights_only=False)
    entries["state"] = json.loads((directory / "manifest.json").read_text())["state"]
    return entries


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Where two nests of containers, tensors, arrays and plain values differ by a bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [f"{where}/{key} is in one only" for key in one.keys() ^ other.keys()]
        return keys + [found for key in one.keys() & other.keys() for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    if torch.is_tensor(one) and torch.is_tensor(other):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif hasattr(one, "tobytes"):  # numpy
        same = one.tobytes() == other.tobytes()
    else:
        same = one == other
    return [] if same else [f"{where} differs"]


def assert_same_run(run_dir: Path, expected: Path, step: int) -> None:
    """Every metric of every step, every question and answer, the final checkpoint and the exported weights: the same, bit for bit."""
    assert [without_times(row) for row in rows(run_dir)] == [without_times(row) for row in rows(expected)]
    last = f"checkpoints/step_{step}"
    assert differences(checkpoint_entries(run_dir / last), checkpoint_entries(expected / last)) == []
    for kind, read in (("rollouts", pyarrow.parquet.read_table), ("evaluations", Path.read_text)):
        names = sorted(path.name for path in (expected / kind).glob("*"))
        assert sorted(path.name for path in (run_dir / kind).glob("*")) == names
        assert all(read(run_dir / kind / name) == read(expected / kind / name) for name in names), kind
    got, wanted = (load_file(folder / "huggingface" / "model.safetensors") for folder in (run_dir, expected))
    assert differences(got, wanted) == []

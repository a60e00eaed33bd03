"""Killed in any phase and resumed, a run ends as one that was never killed: every bit of it.

The phases and moments are drawn from a fixed seed. `make test-long` kills 20 times, at one rank and at TP2 x DP2.
"""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL, run

LONG = os.environ.get("MEGATRON_NFT_LONG") == "1"
PHASES = ("generate", "train", "sync", "checkpoint", "written")  # written: the stage is over, the files may not be
DEFAULT = ("generate", "train", "sync", "written")  # what starts a save is short
WRITING = 0.3  # seconds after the end of a checkpoint stage, at most


def moments(count: int, seed: int) -> list[tuple[str, float, int]]:
    """(phase, where in it from 0 to 1, steps further than the checkpoint): every phase about as often."""
    draw, among = random.Random(seed), PHASES if LONG else DEFAULT
    phases = [phase for _ in range(-(-count // len(among))) for phase in draw.sample(among, len(among))]
    return [(phase, draw.random(), draw.randint(1, 2)) for phase in phases[:count]]


def kill(run_dir: Path, settings: list[str], moment: tuple[str, float, int], expected: list[dict], ranks: int, log: Path) -> None:
    """Start or resume the run, and kill it at a moment; nothing of it lives on."""
    phase, share, further = moment
    step = min(runs.saved_step(run_dir) + further, expected[-1]["step"])
    length = WRITING if phase == "written" else expected[step].get(f"time/{phase}", WRITING)  # of the run that was not killed
    at = {"stage": phase, "step": step, "after": share * length, "signal": "SIGKILL"}
    process = runs.start("train", run_dir, *settings, log=log, at=at, ranks=ranks)
    try:
        assert process.wait(timeout=1500) == -signal.SIGKILL, log.read_text()[-4000:]
    finally:
        runs.end(process)
    assert runs.survivors(run_dir) == []
    print(f"killed at {at}; saved: step {runs.saved_step(run_dir)}")


def killed_often(run_dir: Path, straight: Path, settings: list[str], count: int, ranks: int = 1) -> None:
    expected = runs.rows(straight)
    last = expected[-1]["step"]
    log = run_dir.parent / "log"
    for number, moment in enumerate(moments(count, seed=ranks)):
        if runs.saved_step(run_dir) == last:  # then there is nothing left to kill: another run
            finish(run_dir, straight, settings, last, ranks, log)
            run_dir = run_dir.with_name(f"run{number}")
        kill(run_dir, settings, moment, expected, ranks, log)
    finish(run_dir, straight, settings, last, ranks, log)


def finish(run_dir: Path, straight: Path, settings: list[str], last: int, ranks: int, log: Path) -> None:
    run("train", run_dir, *settings, log=log, ranks=ranks)
    runs.assert_same_run(run_dir, straight, last)


def test_killed_in_every_phase(small, tmp_path):
    killed_often(tmp_path / "run", small, [*SMALL, "checkpoint.interval=1"], 10 if LONG else len(DEFAULT))


@pytest.mark.skipif(not LONG, reason="takes a quarter of an hour: make test-long")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", ["rollout.tensor_parallel_size=1", "rollout.tensor_parallel_size=2"])
def test_killed_in_every_phase_on_four_ranks(engine, tmp_path):
    settings = [*SMALL, "parallel.tensor_model_parallel_size=2", engine, "checkpoint.interval=1"]
    run("train", tmp_path / "straight", *settings, log=tmp_path / "log", ranks=4)
    killed_often(tmp_path / "killed", tmp_path / "straight", settings, 5, ranks=4)

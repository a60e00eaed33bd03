"""Training whose answers come from a server that is killed on the way: it waits, goes on, and its result is valid."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_nft.rollout import serving
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL

KILLS = 10 if os.environ.get("MEGATRON_NFT_LONG") == "1" else 1
STEPS = 2 * KILLS + 2
SERVED = [*SMALL, "rollout.mode=served", f"train.steps={STEPS}", "evaluation.interval=0", f"rollout.served.max_deaths={KILLS + 1}"]


def kill_server(run_dir: Path) -> None:
    """vLLM's own process, not the one that watches over it."""
    [file] = serving.directory(run_dir).glob("*.json")
    os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)


@pytest.mark.timeout(1500)
def test_a_run_outlives_its_server(tmp_path):
    """Every step has all its groups, of all their answers, none of them twice or of weights too old. The log-probs of the first step, whose
    answers no update has crossed, are the trainer's (2e-5)."""
    run_dir = tmp_path / "run"
    server = runs.start("serve", run_dir, *SERVED, log=tmp_path / "server.log")
    trainer = runs.start("train", run_dir, *SERVED, log=tmp_path / "log")
    try:
        for number in range(KILLS):
            while len(runs.rows(run_dir)) < 2 * number + 1 and trainer.poll() is None:
                time.sleep(0.05)
            kill_server(run_dir)
        assert trainer.wait(timeout=1200) == 0, (tmp_path / "log").read_text()[-4000:]
        server.terminate()
        assert server.wait(timeout=60) == 0
    finally:
        runs.end(trainer)
        runs.end(server)
    rows = runs.rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["train/groups_kept"] == 8 and row["train/staleness_max"] <= 1 for row in rows)
    assert (tmp_path / "log").read_text().count("is left out") == KILLS and rows[0]["train/logprob_difference"] < 2e-5
    found = [
        row for step in range(1, STEPS + 1) for row in pyarrow.parquet.read_table(run_dir / f"rollouts/step_{step}.parquet").to_pylist()
    ]
    assert set(Counter((row["step"], row["position"]) for row in found).values()) == {8}
    assert len({row["position"] for row in found}) == 8 * STEPS, "no group is trained on twice"
    assert all(row["step"] - 1 - row["weight_version"] in (0, 1) for row in found)

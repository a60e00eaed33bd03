"""The demo under a real Slurm, over two nodes with two ranks each: it learns; stopped, requeued, killed and submitted anew it ends as if
nothing had happened."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.runs import assert_same_run, rows, saved_step, survivors

SETTINGS = ["train.steps=4", "rollout.prompts_per_step=32", "evaluation.interval=4", "evaluation.k=2", "evaluation.sets.0.limit=128",
            "checkpoint.interval=0", "checkpoint.keep_best=0", "rollout.cpu_kvcache_space=1"]  # fmt: skip
pytestmark = pytest.mark.timeout(1800)  # a job is two minutes on two quiet cores, and there are four starts
NFT = f"{sys.executable} -m megatron_nft"


def submit(cluster, run_dir: Path, log: Path, **environment: object) -> str:
    return cluster.sbatch(f"--output={log}", "slurm/nft_tiny.sbatch", *SETTINGS, RUN_DIR=run_dir, NFT=NFT, OMP_NUM_THREADS=1, **environment)


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory) -> tuple[Path, str]:
    """A run that nothing disturbed, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(cluster, folder / "run", folder / "log")
    assert cluster.wait(job, timeout=900) == "COMPLETED", (folder / "log").read_text()
    return folder / "run", (folder / "log").read_text()


def test_two_nodes_make_a_better_model(whole):
    run_dir, printed = whole
    first, last = rows(run_dir)[0], rows(run_dir)[-1]
    for metric in ("greedy", "avg@2"):
        assert last[f"validation/heldout/{metric}"] > first[f"validation/heldout/{metric}"] + 0.05
    assert len(list(run_dir.glob("rollouts/step_1-*.parquet"))) == 4  # an engine on each rank
    assert printed.index("all-reduce") < printed.index("step 1/4")


def test_preflight_tells_of_the_run(whole):
    run_dir, printed = whole
    lines = dict(line.split(maxsplit=1) for line in printed[: printed.index("step 0/4")].splitlines())
    assert lines["ranks"] == "4 on node1, node2"
    assert lines["run_dir"] == f"{run_dir}: new; the same on all nodes"
    assert "megatron-core" in lines["versions"] and "vllm" in lines["versions"]
    assert lines["all-reduce"].startswith("8 MiB over gloo: ") and lines["all-reduce"].endswith(" GB/s bus bandwidth")


def step_begun(run_dir: Path, step: int) -> bool:
    """Whether the step before it is written down."""
    return bool(rows(run_dir)) and rows(run_dir)[-1]["step"] >= step - 1


def test_stopped_requeued_killed_and_submitted_anew_equals_undisturbed(cluster, whole, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = submit(cluster, run_dir, log, MAX_FAILURES=1)
    cluster.until(lambda: step_begun(run_dir, 2), "step 2", timeout=900)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.until(lambda: cluster.show(job)["Restarts"] == "1", "the requeue", timeout=300)
    saved = saved_step(run_dir)
    assert 1 <= saved <= 2
    assert f"stopped on request after step {saved}, saved; the same command goes on" in log.read_text()
    assert f"ended with 75: back into the queue, to go on from {run_dir}/checkpoints/step_{saved}" in log.read_text()

    cluster.until(lambda: f"resumed after step {saved}" in log.read_text(), "the resumed run", timeout=900)
    cluster.until(lambda: step_begun(run_dir, saved + 2), "a step of its own", timeout=300)
    killed = time.monotonic()
    process_of(run_dir, rank=2).kill()
    assert cluster.wait(job, timeout=120) == "FAILED"
    assert time.monotonic() - killed < 60
    told = log.read_text()
    assert "megatron-nft: rank 2: phase " in told and ": the process is gone: killed, or crashed outside of Python" in told
    assert "srun: error: node2: task 2: Exited with exit code 137" in told  # 128 + SIGKILL, from the bash around the rank
    assert survivors(run_dir) == []

    again = submit(cluster, run_dir, log)
    assert cluster.wait(again, timeout=900) == "COMPLETED", log.read_text()
    assert_same_run(run_dir, whole[0], 4)


def process_of(run_dir: Path, rank: int) -> psutil.Process:
    """The trainer of a rank."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and f"run_dir={run_dir}" in words and process.environ().get("RANK") == str(rank) and words[0] == sys.executable:
            return process
    raise AssertionError(f"no rank {rank} on {run_dir}")

"""The job scripts under a real Slurm, with a stand-in for the program: what is started where, and what becomes of the job."""

import os
from pathlib import Path

import pytest

from tests.support import ROOT

STAND_IN = ROOT / "tests/launch/stand_in.sh"
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=0")
LARGE = {"nft_7b": 4, "nft_32b": 16, "nft_32b_served": 16}


@pytest.fixture
def job(cluster, tmp_path):
    """Submits a script with the stand-in; returns the job's id, its log, and the file of what was started."""

    def submit(script: str, *flags: str, ends: str, **environment: object) -> tuple[str, Path, Path]:
        log, starts = tmp_path / "log", tmp_path / "starts"
        more = {"RUN_DIR": tmp_path / "run", "NFT": STAND_IN, "STARTS": starts, "ENDS": ends, "CACHE": tmp_path / "cache", **environment}
        return cluster.sbatch(f"--output={log}", *flags, f"slurm/{script}.sbatch", "train.steps=3", **more), log, starts

    return submit


def started(starts: Path, command: str) -> list[dict[str, str]]:
    """What the stand-in wrote of each start of a command."""
    lines = starts.read_text().splitlines() if starts.exists() else []
    found = [dict(word.split("=", 1) for word in line.partition(" words=")[0].split()[1:]) | {"words": line.partition(" words=")[2]}
             for line in lines if line.startswith(f"{command} ")]  # fmt: skip
    return sorted(found, key=lambda row: row["rank"])


@pytest.mark.parametrize("script", LARGE)
def test_the_large_scripts_can_be_submitted_at_full_size(cluster, script):
    told = cluster.run("sbatch", "--test-only", f"--partition={cluster.gpu_partition}", f"slurm/{script}.sbatch").stderr
    assert f"using {LARGE[script] * 128} processors on nodes h100-[1-{LARGE[script]}]" in told


@pytest.mark.parametrize("script", ["nft_tiny", "nft_7b", "nft_32b", "nft_32b_served"])
def test_a_script_is_read_on_one_screen(script):
    assert len((ROOT / f"slurm/{script}.sbatch").read_text().splitlines()) <= 50


def test_one_rank_a_gpu_that_meet_at_the_first_node(cluster, job):
    number, log, starts = job("nft_32b", *SMALL, ends="", MODEL="m", TRAIN="t.parquet")
    assert cluster.wait(number) == "COMPLETED", log.read_text()
    for command in ("preflight", "train"):
        ranks = started(starts, command)
        assert [(r["rank"], r["on"], r["local"], r["of"]) for r in ranks] == [
            ("0", "node1", "0", "4"), ("1", "node1", "1", "4"), ("2", "node2", "0", "4"), ("3", "node2", "1", "4"),
        ]  # fmt: skip
        assert {r["at"] for r in ranks} == {f"node1:{20000 + int(number) % 10000}"}
        assert {r["gpus"] for r in ranks} == {"0,1"}  # of its node, all of them: NCCL copies between them
        settings = "examples/qwen2.5_32b/nft.yaml run_dir={} model.path=m data.train=[{{benchmark: dapo_math_17k, path: t.parquet}}] "
        assert f"{command} {settings.format(starts.with_name('run'))}" in ranks[0]["words"] and " train.steps=3" in ranks[0]["words"]
    assert ranks[0]["cache"].startswith(f"{starts.with_name('cache')}/nft-{number}/")
    assert os.listdir(starts.with_name("cache")) == []  # removed at the end


def test_servers_and_trainers_in_one_allocation(cluster, job):
    number, log, starts = job("nft_32b_served", *SMALL, ends="serve=asked", SERVER_NODES=1, TP=1)
    assert cluster.wait(number) == "COMPLETED", log.read_text()
    assert [r["on"] for r in started(starts, "serve")] == ["node1", "node1"]
    assert [(r["on"], r["rank"], r["of"]) for r in started(starts, "train")] == [("node2", "0", "2"), ("node2", "1", "2")]
    assert {r["at"].split(":")[0] for r in started(starts, "train")} == {"node2"}
    looked = started(starts, "preflight")
    assert len(looked) == 4 and "--trainers 2" in looked[0]["words"] and "rollout.served.count=2" in looked[0]["words"]


def test_failures_in_a_row_end_the_job(cluster, job):
    """It requeues itself. The second start saves something, so that the count begins anew with it."""
    number, log, starts = job("nft_tiny", ends="train=7", MAX_FAILURES=3, SAVES_AT=1)
    assert cluster.wait(number) == "FAILED", log.read_text()
    assert (cluster.show(number)["Restarts"], cluster.show(number)["ExitCode"]) == ("4", "7:0")
    assert {r["restart"] for r in started(starts, "train")} == set("01234")
    assert log.read_text().count("ended with 7: back into the queue, to go on from the beginning") == 1
    assert "stopped: 3 starts in a row saved nothing new, the last one ended with 7" in log.read_text()


def test_a_mistake_of_the_users_is_not_tried_again(cluster, job):
    number, log, starts = job("nft_tiny", ends="preflight=2")
    assert cluster.wait(number) == "FAILED" and started(starts, "train") == []
    assert cluster.show(number)["Restarts"] == "0" and "not started again" in log.read_text()


def test_a_job_that_is_cancelled_stays_so(cluster, job):
    """Its ranks save and end with 75, as they do for a requeue."""
    number, log, starts = job("nft_tiny", ends="train=asked")
    cluster.until(lambda: len(started(starts, "train")) == 4, "the ranks")
    cluster.run("scancel", number)
    asked = ("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T")
    cluster.until(lambda: cluster.run(*asked).stdout.strip() == "CANCELLED", "the end of the job")
    assert cluster.show(number)["Restarts"] == "0"


def test_before_the_time_limit_it_goes_back_into_the_queue(cluster, job):
    """Slurm looks at its jobs' times every half a minute or so."""
    number, log, starts = job("nft_tiny", "--time=2", "--signal=B:USR1@110", ends="train=asked")
    cluster.until(lambda: len(started(starts, "train")) == 8, "a second start", timeout=300)
    assert cluster.show(number)["Restarts"] == "1" and started(starts, "train")[-1]["restart"] in "01"
    assert "ended with 75: back into the queue" in log.read_text()
    cluster.run("scancel", number)

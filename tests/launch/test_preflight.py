"""Preflight on two nodes: what one of them alone lacks ends all ranks, with the line of the one that finds it."""

import sys
from pathlib import Path

import pytest

from tests.support import ROOT

NFT = f"{sys.executable} -m megatron_nft"
RANK = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=node1 MASTER_PORT=$PORT exec "$@"'


def preflight(cluster, run_dir: Path, *overrides: str, port: int, **environment: object) -> tuple[int, str]:
    """A rank on each node; the exit code of srun and all that was said."""
    command = [sys.executable, "-m", "megatron_nft", "preflight", "examples/arithmetic/nft.yaml", f"run_dir={run_dir}", *overrides]
    done = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "--overcommit", "bash", "-c", RANK, "rank", *command, check=False,
                       PORT=port, OMP_NUM_THREADS=1, PYTHONPATH=ROOT, **environment)  # fmt: skip
    return done.returncode, done.stdout + "".join(line for line in done.stderr.splitlines(True) if not line.startswith("srun: "))


@pytest.mark.parametrize("what", ["model", "run_dir"])
def test_what_is_on_one_node_only(cluster, tmp_path, what):
    """Each node has a disk of its own at cluster.local."""
    own = cluster.local / what
    if what == "model":
        cluster.run("srun", "--nodes=1", "--nodelist=node1", "cp", "-r", "examples/arithmetic/model", own)
        code, told = preflight(cluster, tmp_path / "run", f"model.path={own}", port=20001)
        problem = f"node2 (rank 1): model.path {own} is missing, and is there on node1: put it on a file system that all nodes see"
    else:
        code, told = preflight(cluster, own / "run", port=20002)
        problem = f"node2 (rank 1): run_dir {own}/run is not the one that rank 0 writes to: name one on a file system"
    assert code == 2 and told.count("\n") == 1 and told.startswith(f"megatron-nft: {problem}")
    assert not (tmp_path / "run").exists()


def test_gpus_that_are_not_seen(cluster, tmp_path):
    """The script for 7B, with GPUs that Slurm hands out and no program finds. It is not tried again."""
    config = tmp_path / "nft.yaml"
    config.write_text("preset: nft-7b\n")
    job = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=0", f"--output={tmp_path}/log", "slurm/nft_7b.sbatch",
        CONFIG=config, MODEL="nowhere", TRAIN="nowhere.parquet", RUN_DIR=tmp_path / "run", NFT=NFT, OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert cluster.wait(job, timeout=600) == "FAILED"
    assert (cluster.show(job)["ExitCode"], cluster.show(job)["Restarts"]) == ("2:0", "0")
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("megatron-nft: ")]
    assert told == ["megatron-nft: node1 (rank 0): 0 GPUs are seen, 2 were asked for: ask Slurm for them (--gpus-per-node=2) and look at "
                    "nvidia-smi there, or leave the node out (sbatch --exclude=node1)"]  # fmt: skip

"""NeMo-Run recipes, run in NeMo-Run's own environment (make .venv-launch/installed): what they would submit, and the tiny one submitted."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

ENVIRONMENT = ROOT / ".venv-launch"
PYTHON = ENVIRONMENT / "bin" / "python"
SIZES = ("tiny", "7b", "32b")
VARIABLES = ("CONFIG", "MODEL", "TRAIN", "RUN_DIR", "CHECKOUT", "CONTAINER", "SBATCH", "SLURM_HOST", "SLURM_USER", "SLURM_JOBDIR")

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "installed").exists(), reason="NeMo-Run is not installed here: make .venv-launch/installed"
)


def nemo(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m megatron_nft.recipes WORDS`, with NeMo-Run's files under `home` and no variable of the tests' own surroundings."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(VARIABLES)}
    mine |= {"NEMORUN_HOME": str(home), "COLUMNS": "200", "VENV": sys.prefix} | environment
    command = [PYTHON, "-m", "megatron_nft.recipes", *words]
    return subprocess.run(command, cwd=ROOT, env=mine, capture_output=True, text=True, timeout=900)


@cache
def dry_run(home: Path, *words: str, environment: tuple[tuple[str, str], ...] = ()) -> tuple[str, str]:
    """The batch script and the script of a task that a dry run prints."""
    done = nemo(home, *words, "--dryrun", **dict(environment))
    assert done.returncode == 0, done.stdout + done.stderr
    batch, task = re.split(r"#-+\n# \S+\.sh, which each task runs\n#-+\n", done.stdout)
    return batch[batch.index("#!/bin/bash") :], task


def flags(script: str) -> dict[str, str]:
    """The flags of #SBATCH lines."""
    words = " ".join(re.findall(r"^#SBATCH (.*)$", script, re.M)).split()
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def settings(script: str) -> list[str]:
    """What is in bash's array `settings` after these lines."""
    done = subprocess.run(
        ["bash", "-euc", script + '\nprintf "%s\\n" "${settings[@]}"'], env={}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def line_of_settings(task: str) -> str:
    return re.search(r"^settings=.*$", task, re.M)[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nemo")


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_asks_for_what_the_job_script_asks_for(home, size):
    batch, _ = dry_run(home, f"nft_{size}", "run.executor=slurm")
    mine, theirs = flags(batch), flags((ROOT / "slurm" / f"nft_{size}.sbatch").read_text())
    for name in ("job-name", "output"):
        assert mine.pop(name) and theirs.pop(name)
    assert theirs["signal"].startswith("B:")  # to its batch script, which hands it on
    assert mine == theirs | {"signal": theirs["signal"].removeprefix("B:")}


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_trains_with_the_job_scripts_settings(home, size):
    _, task = dry_run(home, f"nft_{size}", "run.executor=slurm")
    job = (ROOT / "slurm" / f"nft_{size}.sbatch").read_text()
    lines = re.findall(r"^(?:CONFIG|MODEL|TRAIN|RUN_DIR)=.*$", job, re.M) + [re.search(r'^settings=\(.*?"\$@"\)', job, re.M | re.S)[0]]
    assert sorted(settings(line_of_settings(task))) == sorted(settings("\n".join(lines)))
    assert re.findall(r" (preflight|train) \"\$\{settings", task) == ["preflight", "train"]
    assert "nemo" not in task  # nothing on the nodes needs NeMo-Run


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_slurm_takes_the_job_at_full_size(cluster, home, tmp_path, size):
    batch, _ = dry_run(home, f"nft_{size}", "run.executor=slurm")
    script = tmp_path / "job.sh"
    script.write_text(batch)
    cluster.run("sbatch", "--test-only", "--partition", cluster.gpu_partition, script)
    assert cluster.run("sbatch", "--test-only", "--nodes=17", "--partition", cluster.gpu_partition, script, check=False).returncode


def test_overrides_of_the_command_line_and_variables_arrive(home):
    words = ("run.executor.nodes=8", "run.executor.time=02:00:00", "run.executor.mem_per_gpu=9G", "run.executor.partition=long")
    variables = {"MODEL": "/models/a b", "SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "short", "CONTAINER_IMAGE": "/images/nft.sqsh",
                 "PREFLIGHT": "--a b"}  # fmt: skip
    given = ("nft_32b", "run.executor=slurm", *words, "train.steps=10", "optimizer.lr=5e-7")
    batch, task = dry_run(home, *given, environment=tuple(variables.items()))
    found = flags(batch)
    assert [found[k] for k in ("nodes", "time", "mem-per-gpu", "partition", "account")] == ["8", "02:00:00", "9G", "long", "mine"]
    assert settings(line_of_settings(task))[-2:] == ["train.steps=10", "optimizer.lr=5e-7"]
    assert "model.path=/models/a b" in settings(line_of_settings(task))
    assert "--container-image /images/nft.sqsh" in batch and f"{ROOT}:{ROOT}" in batch
    assert "CONTAINER_IMAGE=/images/nft.sqsh\n" in batch and "export PREFLIGHT='--a b'\n" in batch


def test_over_ssh_a_dry_run_connects_to_nothing(home):
    tunnel = [f"run.executor.tunnel.{w}" for w in ("host=login.invalid", "user=me", "job_dir=/scratch/me/jobs")]
    batch, task = dry_run(home, "nft_32b", "run.executor=slurm_ssh", *tunnel, "checkout=/scratch/me/nft",
                          environment=(("VENV", "/scratch/me/venv"),))  # fmt: skip
    assert flags(batch)["output"].startswith("/scratch/me/jobs/nft_32b/")
    assert "checkout=/scratch/me/nft\n" in batch and "cd /scratch/me/nft\n" in task
    assert str(ROOT) not in batch + task


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.executor=slurm", "train.stepz=3"], "did you mean train.steps?"),
        (["run.executor=slurm", "run.executor.nodes=3", "parallel.tensor_model_parallel_size=4"], "3 nodes of 2 ranks cannot be divided"),
        (["run.executor=slurm", "rollout.mode=served"], "submit slurm/nft_32b_served.sbatch"),
        (["run.executor=slurm", "config=nowhere.yaml"], "nowhere.yaml: pass config=FILE"),
        (["run.executor=slurm", "checkout=/tmp", f"config={ROOT}/examples/arithmetic/nft.yaml"], "/tmp is no checkout"),
        (["run.executor=slurm", "run.executor.nodes=abc"], "run.executor.nodes=abc is not understood"),
        (["run.executor=slurm", "run.executor.nodez=3"], "run.executor.nodez=3 is not understood"),
        (["run.executor=slrm"], "run.executor=slrm is not understood"),
        (["stps=3"], "stps=3 is not understood"),
        (["run.executor=slurm_ssh"], "the SSH tunnel has no host"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(tmp_path, words, said):
    done = nemo(tmp_path / "nemo", "nft_tiny", *words, "--yes")
    assert done.returncode == 2 and said in done.stderr
    assert [line.startswith("megatron-nft: ") for line in done.stderr.splitlines()] == [True]
    assert not list((tmp_path / "nemo").glob("experiments/*/*"))


def test_recipes_are_commands_of_nemorun_and_import_neither_torch_nor_vllm(tmp_path):
    blocked = ("torch", "vllm", "megatron", "transformers", "datasets", "numpy")
    program = f"""
import sys
sys.modules |= dict.fromkeys({blocked})
sys.argv = ["nemorun", "megatron_nft", "--help"]
from nemo_run.__main__ import app
app()
"""
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path), "COLUMNS": "120"}
    done = subprocess.run([PYTHON, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "Couldn't load" not in done.stdout, done.stdout + done.stderr
    assert all(f"nft_{size}" in done.stdout for size in SIZES)


def test_recipes_serve_a_program_of_ones_own(tmp_path):
    program = """
import nemo_run as run
from megatron_nft import recipes
script = recipes.nft_32b(["train.steps=10"])
executor = recipes.fit(recipes.slurm(), script)
print(isinstance(script, run.Script), "train.steps=10" in script.inline, executor.nodes, executor.ntasks_per_node, executor.time)
"""
    environment = os.environ | {"NEMORUN_HOME": str(tmp_path)}
    done = subprocess.run([PYTHON, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == ["True", "True", "16", "8", "24:00:00"], done.stderr


QUICK = ("checkpoint.interval=1", "evaluation.sets=[]", "rollout.prompts_per_step=16", "train.prompts_per_update=8", "rollout.n=4")


def submit(cluster, home: Path, *words: str) -> tuple[str, Path]:
    """Start the tiny recipe on the test's Slurm; the job's id and the folder of its logs."""
    small = ("run.executor.partition=cpu", "run.executor.ntasks_per_node=1", *QUICK)
    done = nemo(home, "nft_tiny", *small, "run.executor=slurm", *words, "--yes", "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (home / "experiments" / "nft_tiny").glob("*/nft_tiny")
    return re.search(r"slurm_tunnel://nemo_run/(\d+)", done.stdout + done.stderr)[1], folder


def steps(run_dir: Path) -> list[int]:
    """Of metrics.jsonl, with those of training."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if "train/loss" in row]


@pytest.mark.timeout(2400)
def test_the_tiny_recipe_trains_on_slurm_saves_on_usr1_and_goes_on_to_its_end(cluster, tmp_path):
    run_dir = tmp_path / "run"
    job, folder = submit(cluster, tmp_path, f"run_dir={run_dir}", "train.steps=4")
    cluster.until(lambda: steps(run_dir), "a first step", 900)
    cluster.run("scancel", "--signal=USR1", job)  # what --signal does before the time limit
    cluster.until(lambda: cluster.show(job)["Restarts"] == "1", "the job back in the queue", 600)
    assert cluster.wait(job, timeout=900) == "COMPLETED", logs(folder)
    assert steps(run_dir) == [1, 2, 3, 4]
    assert (run_dir / "report.html").exists()
    assert "ended with 75: back into the queue" in logs(folder) and "2 on node1, node2" in logs(folder)


@pytest.mark.timeout(1000)
def test_a_job_that_the_user_has_to_mend_is_not_started_again(cluster, tmp_path):
    job, folder = submit(cluster, tmp_path, f"run_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'nowhere'}")
    assert cluster.wait(job, timeout=900) == "FAILED"
    assert cluster.show(job)["Restarts"] == "0" and cluster.show(job)["ExitCode"] == "2:0"
    assert str(tmp_path / "nowhere") in logs(folder) and "mend what is said above" in logs(folder)


@pytest.mark.timeout(1000)
def test_the_tiny_recipe_trains_on_this_machine_under_torchrun(tmp_path):
    words = ("run.executor.ntasks_per_node=2", *QUICK, "train.steps=1", f"run_dir={tmp_path / 'run'}")
    done = nemo(tmp_path / "nemo", "nft_tiny", *words, "--yes")
    assert steps(tmp_path / "run") == [1], done.stdout + done.stderr


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))

"""A Slurm for the tests in this folder, and a look at what runs in it. Without root or Debian's packages they skip and say why."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")


@dataclass(frozen=True)
class Cluster:
    """A running Slurm; the commands here and every process started with os.environ find it by SLURM_CONF."""

    folder: Path
    nodes: tuple[str, ...] = ("node1", "node2")  # of partition cpu, the default one: 8 CPUs each on paper
    gpu_partition: str = "gpu"  # 16 nodes of 8 GPUs that exist on paper: for `sbatch --test-only`

    @property
    def local(self) -> Path:
        """A path under which each node has a small disk of its own."""
        return self.folder / "local"

    def run(self, *command: str | Path, check: bool = True, **environment: str | Path) -> subprocess.CompletedProcess:
        """A command of Slurm's, with more of an environment; from the root of the checkout, as a user submits."""
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=os.environ | {k: str(v) for k, v in environment.items()},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, *arguments: str | Path, **environment: str | Path) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **environment).stdout.strip()

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED, FAILED, ..."""
        return self.show(job)["JobState"]

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a mapping."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 240) -> str:
        """Until the job is in one of these states, by default those that end it; the state."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.until(lambda: next((s for s in [self.state(job)] if s in wanted), None), f"job {job} in {wanted}", timeout)

    @staticmethod
    def until(found, what: str, timeout: float = 240):
        """What `found` returns, as soon as it is true."""
        deadline = time.monotonic() + timeout
        while not (value := found()):
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
            time.sleep(0.2)
        return value


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Slurm, up as long as the tests last."""
    if missing := lacking():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    before = {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "SBATCH"))}
    for name in before:
        del os.environ[name]  # a Slurm around the tests is none of theirs
    try:
        subprocess.run([SCRIPT, "up", folder], check=True, timeout=120)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=120)
        os.environ.pop("SLURM_CONF", None)
        os.environ.update(before)


def lacking() -> str:
    """Why no Slurm can be started here; nothing where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge, or make test-launch as root"
    if os.geteuid():
        return "Slurm's daemons are started as root here, and this is another user"
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "this machine gives no namespaces, in which each of Slurm's nodes has a name and a disk"
    return ""

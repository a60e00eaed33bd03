"""slurm/job.sh without Slurm: stand-ins for its commands. What a start makes of signals, codes, settings and containers."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

# Runs the ranks 0 and 1 one after the other where RUNS says so; where one fails its code is that of ranks which it has killed.
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>"$STARTS"
while [ $# != 0 ] && [ "$1" != bash ]; do shift; done
if [ $# = 0 ] || [ -z "${RUNS:-}" ]; then exit 0; fi
failed=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" || failed=137; done
exit $failed
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "requeued $2"; else echo n1 && echo n2; fi
"""
# the program: ENDS is the end of command and rank, preflight0=2 for example
PROGRAM = """#!/bin/bash
for rule in ${ENDS:-}; do
  if [ "${rule%%=*}" = "$1$RANK" ]; then exit "${rule#*=}"; fi
done
"""
SLURM = {"SLURM_JOB_ID": 1234, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": 2, "SLURM_NTASKS_PER_NODE": 8,
         "SLURM_CPUS_ON_NODE": 128, "SLURM_GPUS_PER_NODE": "h100:8", "CHECKOUT": ROOT}  # fmt: skip


@pytest.fixture
def bash(tmp_path):
    """Runs bash as a batch script is run, in tmp_path."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "squeue": "#!/bin/bash\necho RUNNING\n", "program": PROGRAM}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def run(*words: str | Path, **environment: object) -> subprocess.CompletedProcess:
        given = {**SLURM, "RUN_DIR": tmp_path / "run", "STARTS": tmp_path / "starts", "NFT": tmp_path / "program", "RUNS": 1, **environment}
        mine = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | {key: str(value) for key, value in given.items()}
        return subprocess.run(["bash", *map(str, words)], env=mine, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


TINY = ROOT / "slurm/nft_tiny.sbatch"


def test_in_a_container(bash, tmp_path):
    """The flags are Pyxis'. The container's name is the job's, at each step."""
    done = bash(ROOT / "slurm/nft_7b.sbatch", CONTAINER_IMAGE="nft.sqsh", CONTAINER_MOUNTS="/data,/models", NFT="", RUNS="")
    assert done.returncode == 0, done.stderr
    _, looked, trained, *_, removed = (line for line in (tmp_path / "starts").read_text().splitlines() if line.startswith("--"))
    for line in (looked, trained):
        assert (
            f"--container-image=nft.sqsh --container-name=nft-1234 --container-workdir={ROOT} --container-mounts={ROOT},/data,/models"
            in line
        )
        assert "--nodelist=n1,n2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=16 --cpu-bind=cores" in line
        assert "--kill-on-bad-exit=1 --gpus-per-node=8" in line
        assert re.search(r"--container-env=\S*NCCL_DEBUG,\S*OMP_NUM_THREADS,PYTHONPATH", line)
    calls = (tmp_path / "starts").read_text()
    assert re.search(r"rank python3 -m megatron_nft preflight .*--gpus-per-node 8$", calls, re.M)
    assert removed.endswith("enroot remove -f pyxis_nft-1234")


def test_progress_is_counted_in_the_directory_that_the_settings_name(bash, tmp_path):
    """As for the run, the last word counts. Three starts that save something each are no failures in a row."""
    mine = tmp_path / "mine"
    for start in range(4):
        done = bash(TINY, "run_dir=other", f"run_dir={mine}", ENDS="train0=75", SLURM_RESTART_COUNT=start)
        assert "requeued 1234" in done.stdout and done.returncode == 137, done.stdout + done.stderr
        (mine / f"checkpoints/step_{start + 1}").mkdir(parents=True)
    assert f"to go on from {mine}/checkpoints/step_3" in done.stdout
    assert sorted(os.listdir(mine)) == ["checkpoints", "failures"] and not (tmp_path / "run").exists()


def test_a_start_whose_end_comes_by_a_trap_goes_back_into_the_queue_too(bash, tmp_path):
    """The recipes' batch script ends so, which is NeMo-Run's: megatron_nft/recipes/jobs.py."""
    (tmp_path / "batch").write_text(f"cd {ROOT}\n. slurm/job.sh\ntrap 'code=$?; finish' EXIT\nset -e\nexit 75\n")
    done = bash(tmp_path / "batch")
    assert done.returncode == 75 and "back into the queue" in done.stdout and "requeued 1234" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_rank_finds_is_the_jobs_code(bash, tmp_path, rank):
    """srun's is the highest: of a rank that it killed."""
    done = bash(TINY, ENDS=f"train{rank}=2 train{1 - rank}=1")
    assert done.returncode == 2 and "not started again" in done.stdout and "requeued" not in done.stdout
    assert "requeued" in bash(TINY, ENDS="train0=70", SLURM_RESTART_COUNT=1).stdout  # the note is not the next start's


def test_a_run_directory_that_cannot_be_made(bash, tmp_path):
    (tmp_path / "file").touch()
    done = bash(TINY, f"run_dir={tmp_path}/file/run")
    assert done.returncode == 2 and f"run_dir {tmp_path}/file/run cannot be made" in done.stderr and not (tmp_path / "starts").exists()


SERVED = ROOT / "slurm/nft_32b_served.sbatch"


@pytest.mark.parametrize(
    ("script", "environment", "said"),
    [
        (TINY, {"MAX_FAILURES": "abc"}, "MAX_FAILURES is abc: give a whole number"),
        (TINY, {"VENV": "nowhere", "NFT": ""}, "there is no nowhere/bin/python on "),
        (TINY, {"CHECKOUT": "/"}, "/ is no checkout: submit from the root of one, or set CHECKOUT"),
        (SERVED, {"SERVER_NODES": 2}, "SERVER_NODES is 2 of 2 nodes: leave some to train on"),
        (SERVED, {"SERVER_NODES": "x"}, "SERVER_NODES is x: give a whole number"),
        (SERVED, {"SERVER_NODES": 1, "TP": 3}, "TP is 3: a server's GPUs are of one node, which has 8; take a divisor of it"),
        (SERVED, {"SERVER_NODES": 1, "TP": 16}, "TP is 16: "),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(bash, tmp_path, script, environment, said):
    done = bash(script, **environment)
    assert done.returncode == 2 and done.stderr.startswith(f"megatron-nft: {said}") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == "" and "rank" not in ((tmp_path / "starts").read_text() if (tmp_path / "starts").exists() else "")


def test_a_program_that_is_missing_on_a_node_is_not_tried_again(bash):
    assert "not started again" in bash(TINY, ENDS="preflight1=127").stdout


def test_a_refusal_leaves_no_directory(bash, tmp_path):
    assert bash(TINY, ENDS="preflight0=2").returncode == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("answers", "said"), [(2, "requeued 1234"), (4, "squeue does not say whether the job was cancelled: submit anew")])
def test_squeue_is_asked_again(bash, tmp_path, answers, said):
    """It answers at the second call, or after the third."""
    (tmp_path / "squeue").write_text(
        f"#!/bin/bash\necho >>{tmp_path}/asked\n[ $(wc -l <{tmp_path}/asked) -ge {answers} ] && echo RUNNING\n"
    )
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "sleep").chmod(stat.S_IRWXU)
    assert said in bash(TINY, ENDS="train0=75").stdout


def test_what_a_cancelled_job_left_is_removed(bash, tmp_path):
    """By the next one; not what is another running job's, nor what is none of a job's."""
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ] && [ $# != 0 ]; do shift; done\n"$@"\n')
    for name in ("nft-77", "nft-88", "nft-mine"):
        (tmp_path / name).mkdir()
    other = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "88"})
    try:
        done = bash("-c", BEGUN, CACHE=tmp_path)
    finally:
        other.kill()
        other.wait()
    assert done.returncode == 0 and sorted(path.name for path in tmp_path.glob("nft-*")) == ["nft-88", "nft-mine"], done.stderr


def test_the_plan_is_for_the_allocation(bash, tmp_path):
    """Whatever the config says; a setting that is given goes over it."""
    bash(ROOT / "slurm/nft_32b.sbatch", "plan.nodes=null", RUNS="")
    words = (tmp_path / "starts").read_text()
    assert re.search(r" preflight .* plan.nodes=2 plan.gpus_per_node=8 .*plan.nodes=null ", words)


BEGUN = f". {ROOT}/slurm/job.sh\n"
QUICK = "sleep() { command sleep 0.3; }\n"


def test_a_signal_before_srun_is_known_is_handed_to_it(bash, tmp_path):
    """Here by bash's own debugger, between the two lines."""
    between = "set -T\ntrap 'if [[ $BASH_COMMAND = running=?!* && -z ${sent:-} ]]; then sent=1; kill -USR1 $$; fi' DEBUG\n"
    (tmp_path / "srun").write_text("#!/bin/bash\ntrap 'exit 75' USR1\nfor ((i = 0; i < 100; i++)); do sleep 0.1; done\n")
    done = bash("-c", f'{BEGUN}{QUICK}{between}ranks "n1 n2" -- train\ntrap - DEBUG\necho "$sent $code"')
    assert done.stdout.split() in (["1", "75"], ["1", str(128 + 10)]), done.stdout + done.stderr


def test_a_signal_during_preflight_is_no_failure(bash):
    killed = "srun() { kill -USR1 $$; sleep; exit 138; }\n"
    done = bash("-c", f'{BEGUN}{QUICK}{killed}ranks "n1 n2" -- preflight\necho "$code"\nranks "n1 n2" -- train\necho "$code"')
    assert done.stdout.split() == ["75", "75"], done.stdout + done.stderr


def test_servers_that_hang_do_not_keep_the_job(bash, tmp_path):
    """The wait is of seconds that the test does not wait, too."""
    (tmp_path / "sleep").write_text("#!/bin/bash\nexec /bin/sleep 0.01\n")
    hangs = '#!/bin/bash\nif [ "$1" != --overlap ] && [[ $* == *" serve "* ]]; then trap "" TERM; while true; do /bin/sleep 1; done; fi\n'
    (tmp_path / "srun").write_text(hangs + SRUN)
    (tmp_path / "sleep").chmod(stat.S_IRWXU)
    done = bash(ROOT / "slurm/nft_32b_served.sbatch", ENDS="train0=75", SERVER_NODES=1)
    assert "requeued 1234" in done.stdout, done.stdout + done.stderr

"""Executors, by the names that `run.executor=` takes. What they leave open (nodes, tasks, GPUs, time, signal) the recipe fills in."""

import os
import shlex
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run

from megatron_nft.errors import UserError
from megatron_nft.recipes import jobs

OF_JOB_SH = ("VENV", "NFT", "PREFLIGHT", "MAX_FAILURES", "CACHE")  # variables of slurm/job.sh that reach the job from here


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """This machine: one process, or run.executor.ntasks_per_node of them under torchrun."""
    return run.Config(run.LocalExecutor, ntasks_per_node=1, packager=run.Config(run.Packager))


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """Slurm, from a login node: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, CONTAINER_IMAGE, CONTAINER_MOUNTS, or run.executor.*"""
    return _slurm(run.Config(run.LocalTunnel, job_dir=os.environ.get("SLURM_JOBDIR", "")))


@run.cli.factory
def slurm_ssh() -> run.Config[run.SlurmExecutor]:
    """Slurm, over SSH: SLURM_HOST, SLURM_USER and SLURM_JOBDIR (a folder on the cluster), or run.executor.tunnel.host, .user, .job_dir."""
    host, user, job_dir = (os.environ.get(name, "") for name in ("SLURM_HOST", "SLURM_USER", "SLURM_JOBDIR"))
    return _slurm(run.Config(run.SSHTunnel, host=host, user=user, job_dir=job_dir))


def _slurm(tunnel: run.Config) -> run.Config[run.SlurmExecutor]:
    mounts = os.environ.get("CONTAINER_MOUNTS", "")
    return run.Config(
        run.SlurmExecutor,
        account=os.environ.get("SBATCH_ACCOUNT"),
        partition=os.environ.get("SBATCH_PARTITION"),
        time=os.environ.get("SBATCH_TIMELIMIT"),
        nodes=None,
        ntasks_per_node=None,
        container_image=os.environ.get("CONTAINER_IMAGE"),
        container_mounts=mounts.split(",") if mounts else [],
        srun_args=["--cpu-bind=cores", "--distribution=block:block"],
        job_name_prefix="megatron_nft.",  # NeMo-Run takes what follows the point for the task's name
        env_vars={name: shlex.quote(os.environ[name]) for name in OF_JOB_SH if name in os.environ},
        tunnel=tunnel,
        packager=run.Config(run.Packager),  # nothing is sent along: the job runs in a checkout on the cluster
    )


def fit(executor: run.Executor | run.Config, script: run.Script) -> run.Executor:
    """A copy of an executor with what a recipe's script needs where it says nothing itself. Raises UserError for what it lacks."""
    executor = fdl.build(executor) if isinstance(executor, run.Config) else executor.clone()
    if isinstance(executor, run.SlurmExecutor):
        _fit_slurm(executor, script.metadata)
    elif isinstance(executor, run.LocalExecutor):
        executor.env_vars = {"RANKS": str(executor.ntasks_per_node)} | executor.env_vars
        executor.ntasks_per_node = 1  # torch's launcher starts them, in the job's own environment
    return executor


def _fit_slurm(executor: run.SlurmExecutor, recipe: dict[str, Any]) -> None:
    shape, checkout = recipe["shape"], recipe["checkout"]
    for name, value in _open_fields(shape).items():
        if getattr(executor, name) is None:
            setattr(executor, name, value)
    if executor.nodes * executor.ntasks_per_node % recipe["ranks_divide_by"]:
        raise UserError(
            f"{executor.nodes} nodes of {executor.ntasks_per_node} ranks cannot be divided by TP x PP x CP ({recipe['ranks_divide_by']})",
            "change run.executor.nodes or parallel.*",
        )
    _check_tunnel(executor.tunnel, checkout)
    if executor.container_image and not any(checkout in mount.split(":") for mount in executor.container_mounts):
        executor.container_mounts = [f"{checkout}:{checkout}", *executor.container_mounts]
    if not shape["gpus_per_node"]:  # the same at every start: then a run that was requeued ends bit for bit as one that was not
        executor.env_vars = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} | executor.env_vars
    own = jobs.setup(checkout, recipe["run_dir"], executor.container_image)
    executor.setup_lines = "\n".join(filter(None, (executor.setup_lines, own)))
    executor.additional_parameters = {"requeue": True} | (executor.additional_parameters or {})


def _open_fields(shape: dict[str, Any]) -> dict[str, Any]:
    """sbatch's flags for a shape. The signal goes to the ranks (not B:, to the batch script, which waits for NeMo-Run's srun)."""
    gpus = shape["gpus_per_node"] or None
    return {
        "nodes": shape["nodes"],
        "ntasks_per_node": shape["ranks_per_node"],
        "cpus_per_task": shape["cpus_per_task"],
        "gpus_per_node": gpus,
        "exclusive": True if gpus else None,
        "mem": "0" if gpus else None,
        "time": shape["time"],
        "signal": f"USR1@{shape['notice']}",
    }


def _check_tunnel(tunnel: run.LocalTunnel | run.SSHTunnel, checkout: str) -> None:
    if isinstance(tunnel, run.SSHTunnel):
        for name in ("host", "user", "job_dir"):
            if not getattr(tunnel, name):
                raise UserError(f"the SSH tunnel has no {name}", f"pass run.executor.tunnel.{name}=..., or see recipes/executors.py")
    elif not Path(checkout, "slurm", "job.sh").is_file():
        raise UserError(f"{checkout} is no checkout of megatron_nft", "start there, or pass checkout=DIR")

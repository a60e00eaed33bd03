"""`megatron-nft preflight`: a run's nodes, files and settings looked at on all ranks, in a minute and before any model is loaded.

What would end the run after an hour of loading ends it here, on all ranks, with one line that names the host, the rank and the mend.
Neither Megatron-Core nor vLLM is imported.
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_nft import config, fitting
from megatron_nft.config import Config
from megatron_nft.config.engine import check_world
from megatron_nft.errors import UserError
from megatron_nft.planner.hardware import find
from megatron_nft.policy import check, check_chip, check_machine, devices, topology
from megatron_nft.preflight import nodes, planned, run_directory
from megatron_nft.preflight.table import Found, table
from megatron_nft.preflight.together import Place, gather, leads, meet, together
from megatron_nft.sizes import check_ranks
from megatron_nft.stopping import SIGNALS

MEETING, EXCHANGE = 600, 300  # seconds that ranks may take to start, and that an all-reduce may take


def preflight(path: str, overrides: list[str], gpus_per_node: int = 0, trainers: int | None = None, changed: bool = False) -> None:
    """Look, and print a table on the first rank. Collective: every rank runs it as it would run `train`.

    gpus_per_node: GPUs that each node must show; trainers: ranks that will train, the others being servers' (None: all); changed: let the
    settings of a run that is resumed differ. Raises SystemExit(2) on all ranks where one of them finds a fault; the first has printed it.
    """
    topology.world_size()  # refused in one line where it is no number
    meet(MEETING)
    try:
        found = _look(path, overrides, gpus_per_node, trainers, changed)
    except UserError as error:
        _refuse(error)
    if dist.get_rank() == 0:
        print(table(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _refuse(error: UserError) -> None:
    """All ranks know the fault. The first prints it, and the others wait for that: the launcher ends all when one has ended, and its exit
    code would be that of the signal if one of them were still to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if dist.get_rank() == 0:
        print(f"megatron-nft: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    dist.barrier()
    sys.exit(2)


def _look(path: str, overrides: list[str], asked: int, trainers: int | None, changed: bool) -> Found:
    """From what is quick to look at to what takes longest. Every step ends in a decision of all ranks."""
    here = Place.here()
    settings = together(lambda: config.load(path, overrides))[here]
    together(check_machine)
    versions, gpus = together(nodes.versions), together(devices.gpu_names)
    nodes.check_versions(versions)
    nodes.check_gpus(gpus, asked)
    ranks = list(gpus)
    world, first, leader = len(ranks) if trainers is None else trainers, here == ranks[0], leads(ranks, here)
    together(lambda: check_shape(settings, world, len(ranks), on_gpus=bool(asked)))
    files = _check_files(settings, leader)
    together(lambda: _check_chip(settings, world) if first and gpus[here] else None)
    run_directory.check_shared(Path(settings.run_dir))
    state = together(lambda: run_directory.check_same_run(settings, changed) if first else "")[ranks[0]]
    fits = together(lambda: planned.check_fits(settings, gpus[here]) if first and asked else "")[ranks[0]]
    together(lambda: devices.check_gpu(int(os.environ.get("LOCAL_RANK", "0"))))
    exchange = together(lambda: devices.measure_all_reduce(EXCHANGE))[here]
    cpus, shared_memory = gather(nodes.cpu_count()), min(gather(nodes.room("/dev/shm")))
    return Found(settings, ranks, world, versions[here], gpus[here], files, state, fits, cpus, shared_memory, exchange)


def _check_files(settings: Config, leader: bool) -> list[str]:
    """The settings that name files. One rank of each node looks at them: many that read the same ones would wait for each other."""
    named = nodes.paths(settings)
    found = together(lambda: {key: nodes.digest(Path(path)) for key, path in named.items()} if leader else None)
    nodes.check_files({place: own for place, own in found.items() if own is not None}, named)
    together(lambda: _check_given(settings, named) if leader else None)
    return list(named)


def _check_given(settings: Config, named: dict[str, str]) -> None:
    check(settings, config.max_model_len(settings), training=False)
    for key, path in named.items():
        if not Path(path).exists():
            raise UserError(f"no data file at {path} ({key})", "give its path, on a file system that all nodes see")


def _check_chip(settings: Config, trainers: int) -> None:
    """What the GPUs, which are all of one kind, certainly lack."""
    check_chip(settings)
    fitting.check_trainer(settings, sampling=True, ranks=trainers)
    if settings.rollout.mode == "served":
        fitting.check_engine(settings, config.max_model_len(settings))


def check_shape(settings: Config, trainers: int, ranks: int, on_gpus: bool) -> None:
    """Raise UserError where so many ranks cannot have the layout, or are not those of the plan, and for an unknown plan.gpu."""
    if not 0 < trainers <= ranks:
        raise UserError(f"{trainers} of {ranks} ranks are to train (--trainers)", "give 1 or more, and not more than there are")
    find(settings.plan.gpu)
    check_ranks(settings.parallel, trainers)
    if settings.rollout.mode == "colocated" and not settings.replay:
        check_world(settings.rollout, trainers)
    plan = settings.plan
    if on_gpus and plan.nodes is not None and ranks != plan.nodes * plan.gpus_per_node:
        planned = f"{plan.nodes} nodes of {plan.gpus_per_node} GPUs (plan.nodes)"
        raise UserError(f"{ranks} ranks were started, the config is planned for {planned}",
                        "start so many, or set plan.nodes and plan.gpus_per_node to what there is")  # fmt: skip

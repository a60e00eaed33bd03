"""What preflight found, as the first rank prints it, and what is worth a warning."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_nft.config import Config, best_kept
from megatron_nft.planner.models import find
from megatron_nft.planner.saves import checkpoint_bytes
from megatron_nft.policy.devices import Exchange
from megatron_nft.preflight import nodes
from megatron_nft.preflight.together import Place

# GB/s of bus bandwidth below which something is wrong: an eighth of what a node's eight 400 Gb/s adapters carry, a third of NVLink
LEAST_BETWEEN_NODES, LEAST_WITHIN_NODE = 50, 150
LEAST_CPUS = 4  # of a rank with a GPU: the trainer's thread, the engine's, NCCL's proxies, verdicts
LEAST_SHARED_MEMORY = 8 * 2**30  # bytes of /dev/shm with GPUs: NCCL and vLLM exchange there


@dataclass(frozen=True)
class Found:
    """A run that may begin."""

    settings: Config
    ranks: list[Place]
    trainers: int  # of the ranks; the others are servers'
    versions: dict[str, str]
    gpus: list[str]  # of a node
    files: list[str]  # settings that name files
    run_dir: str  # what is in it
    fits: str  # the planner's verdict; "": none
    cpus: list[int]  # of each rank
    shared_memory: int  # bytes, of the node that has least
    exchange: Exchange

    @property
    def hosts(self) -> list[str]:
        """The nodes, in the order of their ranks."""
        return list(dict.fromkeys(place.host for place in self.ranks))


def table(found: Found) -> str:
    """One line for each thing that was looked at, and the warnings."""
    run_dir, exchange = found.settings.run_dir, found.exchange
    rows = {
        "ranks": f"{len(found.ranks)} on {', '.join(found.hosts)}",
        "versions": ", ".join(f"{name} {version or 'none'}" for name, version in found.versions.items()) + "; the same on all ranks",
        "GPUs": f"{len(found.gpus)} x {found.gpus[0]} on each node" if found.gpus else "none",
        "layout": _layout(found.settings, found.trainers),
        "files": f"{', '.join(found.files)}; the same on all nodes",
        "run_dir": f"{run_dir}: {found.run_dir}; the same on all nodes",
        "memory": found.fits,
        "CPUs": f"{min(found.cpus)} of a rank, or more",
        "room": f"{_gib(nodes.room(run_dir))} in run_dir, {_gib(found.shared_memory)} or more in /dev/shm",
        "all-reduce": f"{exchange.bytes / 2**20:.0f} MiB over {exchange.backend}: {exchange.bandwidth / 1e9:.2f} GB/s bus bandwidth"
        if len(found.ranks) > 1
        else "",
    }
    return "\n".join([*(f"{name:<11} {text}" for name, text in rows.items() if text), *(f"warning: {text}" for text in warnings(found))])


def _layout(settings: Config, trainers: int) -> str:
    parallel, rollout = settings.parallel, settings.rollout
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    engines = rollout.served.count if rollout.mode == "served" else trainers // rollout.tensor_parallel_size
    return f"TP{tp} PP{pp} CP{cp} DP{trainers // (tp * pp * cp)}; vLLM: {engines} x TP{rollout.tensor_parallel_size}"


def warnings(found: Found) -> Iterator[str]:
    """What a run can begin with and may come to regret."""
    gpus, disk, saved = bool(found.gpus), nodes.room(found.settings.run_dir), _saved(found)
    kept = found.settings.checkpoint.keep + best_kept(found.settings) + 1  # one is being written
    if disk < (needed := kept * saved):
        yield f"{_gib(disk)} are free in run_dir; {kept} checkpoints, one of them being written, take some {_gib(needed)}"
    if gpus and min(found.cpus) < LEAST_CPUS:
        yield f"a rank has {min(found.cpus)} CPUs, {LEAST_CPUS} are better: ask for whole nodes (--exclusive), or for --cpus-per-task"
    if gpus and found.shared_memory < LEAST_SHARED_MEMORY:
        yield f"/dev/shm has {_gib(found.shared_memory)}, {_gib(LEAST_SHARED_MEMORY)} are better: mount a larger one in the container"
    least = LEAST_BETWEEN_NODES if len(found.hosts) > 1 else LEAST_WITHIN_NODE
    if found.exchange.backend == "nccl" and found.exchange.bandwidth < least * 1e9:
        yield f"less than {least} GB/s of bus bandwidth: with NCCL_DEBUG=INFO NCCL says which network it took"


def _saved(found: Found) -> int:
    """Bytes of a checkpoint."""
    settings = found.settings
    if settings.model.precision == "auto":
        settings = replace(settings, model=replace(settings.model, precision="bf16" if found.gpus else "fp32"))
    return checkpoint_bytes(settings, find(settings.model.path).hf)["checkpoint"]


def _gib(count: float) -> str:
    return f"{count / 2**30:,.0f} GiB"

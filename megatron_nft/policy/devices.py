"""A node's GPUs and the network between ranks, looked at before Megatron-Core or a model is loaded."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_nft.errors import UserError, first_line
from megatron_nft.policy import machine

REPEATS, WARM_UP = 5, 2
MOST_IN_USE = 0.1  # of a GPU's memory, by others


def gpu_names() -> list[str]:
    """The GPUs that this process sees, by their product names."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch tells of it, before anything of it is in use."""

    number: int
    name: str
    memory: int  # bytes in all


def own_gpu() -> Gpu | None:
    """This rank's; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(machine.local_rank())
    return Gpu(machine.local_rank(), properties.name, properties.total_memory)


def check_gpu(number: int) -> None:
    """Raise UserError where a GPU does not compute, or others use its memory. Does nothing where there is none."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.set_device(number)
        ones = torch.ones(256, 256, device="cuda")
        right = (ones @ ones).sum().item() == 256.0**3
    except RuntimeError as error:  # CUDA's errors and out of memory
        raise UserError(f"GPU {number} does not work ({first_line(error)})", "look at nvidia-smi there, and leave out the node") from error
    if not right:
        raise UserError(f"GPU {number} computes wrong results", "leave out the node, and have it repaired")
    free, total = torch.cuda.mem_get_info()
    if total - free > MOST_IN_USE * total:
        used = f"{(total - free) / 2**30:.0f} of {total / 2**30:.0f} GiB"
        raise UserError(f"of GPU {number} {used} are in use", "end what runs there (nvidia-smi), or leave out the node")


@dataclass(frozen=True)
class Exchange:
    """An all-reduce over all ranks, as it was measured."""

    backend: str
    bytes: int
    bandwidth: float  # bytes/s of the slowest link, "bus bandwidth": 2 (n - 1) / n x bytes / seconds, as nccl-tests count it


def measure_all_reduce(seconds: float) -> Exchange:
    """All-reduce a large tensor over all ranks, with NCCL where there are GPUs and gloo elsewhere. Collective.

    Raises UserError for a wrong sum, and where the network refuses; RuntimeError of torch's where it takes longer than `seconds`.
    """
    cuda = torch.cuda.is_available()
    backend, count = ("nccl", 2**28) if cuda else ("gloo", 2**23)
    ranks, device = dist.get_world_size(), "cuda" if cuda else "cpu"
    with _refusals_reported(backend):
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=seconds))
        tensor = torch.ones(count // 4, device=device)
        for _ in range(WARM_UP):
            dist.all_reduce(tensor, group=group)
        right = bool((tensor == float(ranks) ** WARM_UP).all())
        start = _now(cuda)
        for _ in range(REPEATS):
            dist.all_reduce(tensor.fill_(1.0), group=group)
        taken = (_now(cuda) - start) / REPEATS
        dist.destroy_process_group(group)
    if not right:
        raise UserError(f"an all-reduce over {backend} gave a wrong sum", "have the network between the nodes looked at")
    return Exchange(backend, count, 2 * (ranks - 1) / ranks * count / taken)


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _refusals_reported(backend: str) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        mend = "run it with NCCL_DEBUG=INFO, and see that NCCL_SOCKET_IFNAME and NCCL_IB_HCA name the network between the nodes"
        raise UserError(f"no all-reduce over {backend} ({first_line(error)})", mend) from error

"""Ranks: torch.distributed, Megatron-Core's groups, and this rank's place in them. The one place for rank arithmetic."""

import os
import random
import socket
import sys
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist

from megatron_nft import watchdog
from megatron_nft.config import ParallelConfig
from megatron_nft.errors import UserError
from megatron_nft.policy import cpu, versions
from megatron_nft.sizes import check_ranks, expert_tensor_size, virtual_size


@dataclass(frozen=True)
class Topology:
    """This rank's place. A replica is the set of ranks that together hold one copy of the model."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    replica_of_rank: tuple[int, ...]  # data-parallel rank of every rank of the world
    virtual_size: int = 1  # model chunks of a pipeline stage
    context_rank: int = 0
    context_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that writes logs and reports."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the log-probs and losses are computed."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def speaks(self) -> bool:
        """True on one of the ranks that compute the same losses: its metrics count. Context-parallel ranks each have a share of them."""
        return self.is_last_stage and self.tensor_rank == 0

    @property
    def sequence_multiple(self) -> int:
        """Slots of a sequence in a micro-batch divide by this: each context-parallel rank takes two slices of it."""
        return 2 * self.context_size if self.context_size > 1 else 1

    def slice_of(self, expert: bool) -> tuple[int, int]:
        """This rank's number, and the count, of the slices a weight is cut into: an expert's, or any other."""
        return (self.expert_tensor_rank, self.expert_tensor_size) if expert else (self.tensor_rank, self.tensor_size)

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches of an update are a multiple of this: what Megatron's interleaved schedule asks for."""
        return self.pipeline_size if self.virtual_size > 1 else 1


def world_size() -> int:
    """Ranks of this run, from the launcher's environment (torchrun, or srun with our scripts); 1 without a launcher."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"the environment's WORLD_SIZE is {given!r}", "start the program by torchrun or srun, or unset it")
    return int(given)


def initialize(parallel: ParallelConfig, seed: int) -> Topology:
    """Start torch.distributed (NCCL with CUDA, gloo without) and Megatron-Core's groups; seed all generators.

    Megatron keeps tensor-parallel ranks adjacent, then context, then data; pipeline stages are outermost.
    """
    check_ranks(parallel, world_size())
    start_distributed()
    make_groups(parallel)
    from megatron.core import tensor_parallel

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return place(parallel, tuple(int(rank) for [rank] in gathered([_data_rank()])))


def make_groups(parallel: ParallelConfig, **more) -> None:
    """Megatron-Core's groups over torch.distributed's world; more: further arguments of initialize_model_parallel."""
    versions.prepare()
    cpu.adapt()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size(parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(parallel),
        distributed_timeout_minutes=int(watchdog.patience().total_seconds() // 60),
        **more,
    )


def _data_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def place(parallel: ParallelConfig, replica_of_rank: tuple[int, ...]) -> Topology:
    """This rank's place, as Megatron's groups have it."""
    from megatron.core import parallel_state as groups

    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=groups.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_rank=groups.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline_model_parallel_size,
        data_rank=_data_rank(),
        data_size=groups.get_data_parallel_world_size(),
        replica_of_rank=replica_of_rank,
        virtual_size=virtual_size(parallel) or 1,
        context_rank=groups.get_context_parallel_rank(),
        context_size=parallel.context_parallel_size,
        expert_rank=groups.get_expert_model_parallel_rank(),
        expert_size=parallel.expert_model_parallel_size,
        expert_tensor_rank=groups.get_expert_tensor_parallel_rank(),
        expert_tensor_size=expert_tensor_size(parallel),
    )


def device() -> torch.device:
    """Where this rank's tensors live."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


_world_of_one: dict[str, str] = {}  # what start_distributed put into the environment in a launcher's place


def start_distributed() -> None:
    """Start torch.distributed as the launcher's environment says; a world of one where there is no launcher."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:  # no launcher: a world of one
        _world_of_one.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        os.environ.update(_world_of_one)  # vLLM reads it, too
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=watchdog.patience())


def gathered(values: list[float]) -> list[list[float]]:
    """Equally many numbers of each rank, on every rank, by rank. Collective, over gloo: no GPU waits for it."""
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


def host() -> str:
    """This rank's machine: Slurm's own name of the node, which its commands take, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def hosts() -> list[str]:
    """The machine of each rank. Collective."""
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, host())
    return everyone


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shutdown() -> None:
    """Tear down Megatron's groups and torch.distributed; leave the environment as it was found."""
    if dist.is_initialized():
        if "megatron.core" in sys.modules:  # evaluation runs without it
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    while _world_of_one:  # a process started later is no rank of this world
        os.environ.pop(_world_of_one.popitem()[0], None)

"""Ranks: torch.distributed, Megatron-Core's groups, and this rank's place in them. The one place for rank arithmetic."""

import os
import socket
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_nft.config import ParallelConfig
from megatron_nft.errors import UserError
from megatron_nft.policy import cpu, versions


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

    @property
    def is_first(self) -> bool:
        """True on the rank that writes logs and reports."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the log-probs and losses are computed."""
        return self.pipeline_rank == self.pipeline_size - 1


def world_size() -> int:
    """Ranks of this run, from the launcher's environment (torchrun, or srun with our scripts); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check(parallel: ParallelConfig, world: int) -> None:
    """Raise UserError for sizes that cannot be laid out over `world` ranks."""
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world % model:
        raise UserError(
            f"world size {world} is not divisible by tensor_model_parallel_size x pipeline_model_parallel_size "
            f"({parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size})",
            f"start a multiple of {model} ranks (torchrun --nproc-per-node) or change parallel.*",
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError("parallel.sequence_parallel is on with tensor_model_parallel_size 1", "turn it off, or use TP 2 or more")


def initialize(parallel: ParallelConfig, seed: int) -> Topology:
    """Start torch.distributed (NCCL with CUDA, gloo without) and Megatron-Core's groups; seed Megatron's RNG.

    Megatron keeps tensor-parallel ranks adjacent and pipeline stages outermost.
    """
    check(parallel, world_size())
    start_distributed()
    versions.quiet()
    cpu.adapt()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    data_rank = torch.tensor([parallel_state.get_data_parallel_rank()], device=device())
    everyone = [torch.zeros_like(data_rank) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, data_rank)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline_model_parallel_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        replica_of_rank=tuple(int(r) for r in everyone),
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
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


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

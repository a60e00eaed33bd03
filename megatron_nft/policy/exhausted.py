"""A GPU whose memory is used up: what stood in it is written down before the error takes it away, and one line says how to mend it."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nft import watchdog
from megatron_nft.errors import UserError
from megatron_nft.files import write_whole
from megatron_nft.policy.topology import host

EXIT_CODE = 2  # of a UserError
LESS_TRAINING = (
    "lower train.tokens_per_micro_batch, set train.recompute_granularity=selective, or raise parallel.tensor_model_parallel_size "
    "or context_parallel_size"
)
LESS_ENGINE = "lower rollout.gpu_memory_utilization or rollout.max_num_seqs, or set train.offload=optimizer"
MENDS = {
    "generate": LESS_ENGINE,
    "validate": LESS_ENGINE,
    "sync": "lower rollout.gpu_memory_utilization or rollout.update_weights_bucket_megabytes",
    "checkpoint": "set train.offload=gradients, or lower rollout.gpu_memory_utilization",
    "start": "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size, or lower rollout.gpu_memory_utilization",
    "old_logprobs": "lower train.logprob_tokens_per_micro_batch or " + LESS_TRAINING.removeprefix("lower "),
}  # of other phases: LESS_TRAINING


def record_allocations() -> None:
    """Note the Python stack of every allocation that lives, for the snapshot (profile.memory_history). Nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(enabled="state", stacks="python")


@contextmanager
def memory_told(run_dir: str | Path, phase: str | None = None) -> Iterator[None]:
    """Turn torch's out-of-memory error in what runs inside into a line on what happened in which phase (None: the watchdog's), where
    it is written down, and what to change.

    Raises it as a UserError. Where there are other ranks, which wait for this one, the line is printed and the process ends with its
    exit code at once: a tidy end would wait for them.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = _report(Path(run_dir), phase or watchdog.running() or "start", error)
        if dist.is_initialized() and dist.get_world_size() > 1:
            print(f"megatron-nft: {told}", file=sys.stderr, flush=True)
            watchdog.take_leave()
            os._exit(EXIT_CODE)
        raise told from error


def _report(run_dir: Path, phase: str, error: torch.OutOfMemoryError) -> UserError:
    rank = dist.get_rank() if dist.is_initialized() else 0
    what = " ".join(str(error).split()).split(" If reserved")[0].rstrip(".")
    try:
        where = f"{_write(run_dir, rank, error)} says what stood in it"
    except OSError as problem:
        where = f"no snapshot could be written ({problem.strerror})"
    return UserError(
        f"rank {rank} on {host()} ran out of memory in {phase}: {what}; {where}",
        f"{MENDS.get(phase, LESS_TRAINING)}; `megatron-nft plan CONFIG --search` shows what fits",
    )


def _write(run_dir: Path, rank: int, error: torch.OutOfMemoryError) -> Path:
    """The traceback with torch's table of what is allocated, and, of a GPU, the snapshot for pytorch.org/memory_viz; the one to look at."""
    text = "".join(traceback.format_exception(error))
    path = run_dir / f"memory-rank{rank}.txt"
    if not torch.cuda.is_available():
        return write_whole(path, text)
    write_whole(path, f"{text}\n{torch.cuda.memory_summary()}")
    snapshot = path.with_suffix(".pickle")
    torch.cuda.memory._dump_snapshot(str(snapshot))
    return snapshot

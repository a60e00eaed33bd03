"""Writing a checkpoint while training goes on.

The caller waits for the snapshot alone: the state gathered, as Megatron's distributed checkpoints have it, and what lives in the model
copied to the host. A thread of every rank plans the files with the others (by a process group of its own), writes and sums up its own
file, and the first rank completes the directory. A thread, because a fork of a process that holds CUDA and an engine is neither quick nor
safe; writing and checksums leave the interpreter to the loop.
"""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist

from megatron_nft import watchdog
from megatron_nft.errors import UserError, os_error_behind
from megatron_nft.policy import cpu, files, manifest, versions
from megatron_nft.weights import copy_companions

Files = Callable[[Path], list[Path]]  # given the directory, writes files there and names them


@dataclass
class Saved:
    """How a save ended, the same on every rank but for the time this one waited."""

    directory: Path
    stalled: float  # seconds that the caller of start() and finish() waited
    seconds: float  # from the start until the directory was complete
    problem: str | None  # None: it is complete; otherwise nothing is left of it


@dataclass(frozen=True)
class Problem:
    """Why a save did not end well."""

    text: str
    of_disk: bool  # otherwise a fault of the program


@dataclass
class Snapshot:
    """What a checkpoint will hold: nothing of it changes while training goes on."""

    sharded: dict  # Megatron's ShardedTensors and ShardedObjects
    common: dict | None  # of the first rank, for common.pt; None where this Megatron-Core keeps it in `sharded`
    about: dict  # the manifest but for its files
    companions: Path  # the directory of config and tokenizer
    then: Callable[[], None]  # called in the first rank's thread when the directory is complete
    more: Files | None = None  # called in every rank's thread


class Saver:
    """The saves of one policy, one at a time. All methods are collective."""

    def __init__(self):
        from megatron.core.dist_checkpointing.strategies import filesystem_async, torch  # noqa: F401 (takes long: not in the first save)

        self._group = dist.new_group(backend="gloo", timeout=watchdog.patience())
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._problem: Problem | None = None  # of any rank
        self._fault: BaseException | None = None  # of this rank
        self._validated = False
        self._kept: dict[int, torch.Tensor] = {}  # memory for what is copied to the host

    def start(
        self,
        directory: Path,
        make_state: Callable[[], dict],
        live: list[torch.Tensor],
        about: dict,
        companions: Path,
        then: Callable[[], None],
        more: Files | None = None,
    ) -> None:
        """Take a snapshot and begin to write it. make_state gives Megatron's sharded state; live: tensors that training changes; the rest
        is as in Snapshot."""
        if self._thread is not None:
            raise RuntimeError("a save is under way: finish it first")
        started = time.perf_counter()
        with cpu.plain():
            # how the ranks share the tensors does not change: Megatron compares it between all of them once
            sharded, common = versions.split_state(make_state(), validate=not self._validated)
            self._validated = True
            snapshot = Snapshot(self._on_host(sharded, live), copy.deepcopy(common), copy.deepcopy(about), companions, then, more)
        self._saved = Saved(directory, 0.0, 0.0, None)
        self._thread = threading.Thread(target=self._run, args=(directory, snapshot, started), name="checkpoint", daemon=True)
        self._thread.start()
        self._saved.stalled = time.perf_counter() - started

    @property
    def under_way(self) -> bool:
        """Whether a save was started and not finished; the same on every rank."""
        return self._thread is not None

    def finish(self, wait: bool) -> Saved | None:
        """The save that was started, once it has ended on every rank; None while it has not, and where none was started.

        Raises, on every rank, what was a fault of the program and not of the disk.
        """
        if self._thread is None:
            return None
        started = time.perf_counter()
        if not wait and not self._ended_everywhere():
            self._saved.stalled += time.perf_counter() - started
            return None
        self._thread.join()
        saved, problem, fault = self._saved, self._problem, self._fault
        self._thread = self._saved = self._problem = self._fault = None
        if fault is not None and (problem is None or not problem.of_disk):
            raise fault
        if problem is not None and not problem.of_disk:
            raise RuntimeError(f"a checkpoint could not be saved: {problem.text}")
        saved.problem = None if problem is None else problem.text
        saved.stalled += time.perf_counter() - started
        return saved

    def _ended_everywhere(self) -> bool:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        running = torch.tensor([int(self._thread.is_alive())], device=device)
        dist.all_reduce(running, dist.ReduceOp.MAX)
        return not running.item()

    def _on_host(self, sharded: dict, live: list[torch.Tensor]) -> dict:
        """Tensors on the host that share nothing with the live ones, in memory that is kept for the next save; other objects copied."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        storages = {tensor.untyped_storage().data_ptr() for tensor in live}
        for number, entry in enumerate(nested_values(sharded)):
            if not isinstance(entry, ShardedTensor):
                entry.data = copy.deepcopy(entry.data)
                continue
            values = versions.plain(entry.data.detach())
            if values.device.type == "cpu" and values.untyped_storage().data_ptr() not in storages:
                entry.data = values
                continue
            kept = self._kept.get(number)
            if kept is None or (kept.shape, kept.dtype) != (values.shape, values.dtype):
                kept = self._kept[number] = torch.empty(values.shape, dtype=values.dtype, device="cpu")
            entry.data = kept.copy_(values, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return sharded

    # ---- in the thread

    def _run(self, *arguments) -> None:
        try:
            self._save(*arguments)
        except BaseException as error:  # raised by finish(): the other ranks may wait for what this one did not come to
            self._fault = error

    def _save(self, directory: Path, snapshot: Snapshot, started: float) -> None:
        """Write, and agree with the other ranks on how it went."""
        first = dist.get_rank() == 0
        written = self._first_ranks(lambda: _make_hidden(directory) if first else None)
        if isinstance(written, Path):
            outcome = self._first_ranks(self._write(written, directory, snapshot))
            if first and outcome is not None:
                rmtree(written, ignore_errors=True)
        else:
            outcome = written
        self._problem = outcome
        self._saved.seconds = time.perf_counter() - started

    def _write(self, written: Path, directory: Path, snapshot: Snapshot) -> Callable[[], Problem | None]:
        """Write this rank's part; returns what completes the directory (on the first rank) or tells the first problem of any rank."""
        with cpu.adapted():
            writer, metadata = files.plan_files(snapshot.sharded, written, self._group)
        results, marks, problem = [], {}, None
        try:
            results = writer.write()
            others = snapshot.more(written) if snapshot.more else []
            marks = manifest.secured(written, [*writer.paths(), *others])
        except Exception as error:  # told to the other ranks, which wait for this one's results, and raised by finish()
            problem = self._told(error)
        everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((results, marks, problem), everyone, dst=0, group=self._group)

        def complete() -> Problem | None:
            if problems := [problem for _, _, problem in everyone or () if problem]:
                return problems[0]
            if everyone is not None:
                _complete(written, directory, snapshot, writer, metadata, everyone)
            return None

        return complete

    def _first_ranks(self, function: Callable[[], Any]) -> Any:
        """What the function returns on the first rank, or its problem; on every rank."""
        outcome = [None]
        if dist.get_rank() == 0:
            try:
                outcome = [function()]
            except Exception as error:  # raised by finish()
                outcome = [self._told(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]

    def _told(self, error: Exception) -> Problem:
        self._fault = error
        disk = os_error_behind(error)
        if disk is None:
            return Problem(f"rank {dist.get_rank()}: {error!r}", of_disk=False)
        where = f" ({disk.filename})" if disk.filename else ""
        return Problem(f"{disk.strerror or disk}{where}", of_disk=True)


def failed(saved: Saved) -> UserError:
    """The error of a save that must not fail."""
    return UserError(f"{saved.directory.name} could not be saved: {saved.problem}", "make room on the disk, or choose another run_dir")


def _make_hidden(directory: Path) -> Path:
    written = manifest.hidden(directory)
    written.mkdir(parents=True)
    return written


def _complete(written: Path, directory: Path, snapshot: Snapshot, writer, metadata, everyone: list) -> None:
    """On the first rank, when all files of tensors are in: the small files, the manifest, the final name."""
    copy_companions(snapshot.companions, written)
    if snapshot.common is not None:
        files.write_common(snapshot.common, written)
    files.write_index(writer, metadata, [results for results, _, _ in everyone], written)
    known = {name: mark for _, marks, _ in everyone for name, mark in marks.items()}
    others = [file for file in written.rglob("*") if file.is_file() and str(file.relative_to(written)) not in known]
    known |= manifest.secured(written, others)
    manifest.publish(written, snapshot.about | {"files": dict(sorted(known.items()))}, directory)
    snapshot.then()

"""An out-of-memory error becomes a line with rank, phase, size, file and mend. A stand-in raises it: there is no GPU here."""

import os
import socket
from functools import partial

import pytest
import torch

from megatron_nft import watchdog
from megatron_nft.errors import UserError
from megatron_nft.logbook import Logbook
from megatron_nft.policy import exhausted
from megatron_nft.policy.exhausted import memory_told

SAID = (
    "CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.21 GiB is free. Of the allocated "
    "memory 70.00 GiB is allocated by PyTorch, and 5.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def exhaust() -> None:
    raise torch.OutOfMemoryError(SAID)


def test_one_line_says_it_all(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node-3")
    with pytest.raises(UserError) as caught, memory_told(tmp_path, "train"):
        exhaust()
    line = str(caught.value)
    assert line.startswith("rank 0 on node-3 ran out of memory in train: CUDA out of memory. Tried to allocate 2.32 GiB")
    assert "1.21 GiB is free" in line and "try setting" not in line and "\n" not in line
    assert f"; {tmp_path / 'memory-rank0.txt'} says what stood in it: lower train.tokens_per_micro_batch" in line
    assert line.endswith("`megatron-nft plan CONFIG --search` shows what fits")
    written = (tmp_path / "memory-rank0.txt").read_text()
    assert "in exhaust" in written and "2.32 GiB" in written  # the traceback


@pytest.mark.parametrize(("phase", "mend"), [("generate", "gpu_memory_utilization"), ("old_logprobs", "logprob_tokens_per_micro_batch")])
def test_the_mend_is_the_phases(phase, mend, tmp_path):
    with pytest.raises(UserError, match=mend), memory_told(tmp_path, phase):
        exhaust()


def test_without_a_phase_it_is_the_watchdogs(tmp_path):
    told = pytest.raises(UserError, match="out of memory in start: .*tensor_model_parallel_size")
    with watchdog.Watchdog(60, 0, tmp_path), told, memory_told(tmp_path):
        exhaust()


def test_a_stage_of_the_log_is_the_phase(tmp_path):
    """As a run puts it together: the stage's name, whatever the watchdog has gone back to by the time the error is out."""
    log = Logbook(tmp_path, "run", 1, enabled=False, around=partial(memory_told, tmp_path))
    told = pytest.raises(UserError, match="out of memory in sync: .*update_weights_bucket_megabytes")
    with watchdog.Watchdog(60, 0, tmp_path), told, memory_told(tmp_path), log.stage("sync"):
        exhaust()


def test_it_is_told_once(tmp_path):
    with pytest.raises(UserError, match="in generate:"), memory_told(tmp_path), memory_told(tmp_path, "generate"):
        exhaust()


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), memory_told(tmp_path, "train"):
        raise RuntimeError("something else")
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_the_line_is_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exhausted, "write_whole", full)
    with pytest.raises(UserError, match=r"no snapshot could be written \(No space left on device\)"), memory_told(tmp_path, "train"):
        exhaust()


def test_where_others_wait_the_process_ends_at_once(tmp_path, monkeypatch, capfd):
    class Left(BaseException):
        pass

    def leave(code):
        assert told == ["leave"]  # else the watchdog's helper would tell of a process that was killed
        raise Left(code)

    told = []
    monkeypatch.setattr(watchdog, "take_leave", lambda: told.append("leave"))

    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    monkeypatch.setattr(exhausted.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(exhausted.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(exhausted.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left, memory_told(tmp_path, "train"):
        exhaust()
    assert left.value.args == (2,) and (tmp_path / "memory-rank3.txt").exists()
    assert capfd.readouterr().err.startswith(f"megatron-nft: rank 3 on {socket.gethostname()} ran out of memory in train: ")


def test_the_snapshot_of_a_gpu(tmp_path, monkeypatch):
    """Where there is one, torch's table and the snapshot come with it, and the snapshot is what the line names."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "the table")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "wb").close())
    with pytest.raises(UserError, match=r"memory-rank0.pickle says what"), memory_told(tmp_path, "train"):
        exhaust()
    assert (tmp_path / "memory-rank0.pickle").exists() and "the table" in (tmp_path / "memory-rank0.txt").read_text()


def test_allocations_are_recorded_on_a_gpu_alone(monkeypatch):
    recorded = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: recorded.append(settings))
    exhausted.record_allocations()
    assert recorded == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    exhausted.record_allocations()
    assert recorded == [{"enabled": "state", "stacks": "python"}]

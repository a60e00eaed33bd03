"""A request to stop: noted, agreed on, forgotten by children, and obeyed in time by a process that hangs."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from megatron_nft.stopping import SIGNALS, StopRequest
from tests.support import ROOT

HEAD = "import os, signal, sys, time\nfrom megatron_nft.stopping import StopRequest, leave_to_parent\n"


def script(body: str) -> subprocess.CompletedProcess:
    """A program of its own; what hangs in it must be ended by the request."""
    return subprocess.run([sys.executable, "-c", HEAD + body], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_nothing_else(number):
    with StopRequest(grace_time=1000) as stop:
        stop.begin()
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.agreed()
    assert signal.set_wakeup_fd(-1) == -1
    os.kill(os.getpid(), number)  # one that comes while the process ends
    for n in SIGNALS:
        assert signal.signal(n, signal.SIG_DFL) is signal.SIG_IGN


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(grace_time=1000):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_without_the_signals_nobody_asks():
    assert not StopRequest(grace_time=1).agreed()


def test_the_first_signal_starts_the_clock(monkeypatch):
    stop, now = StopRequest(grace_time=100), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop._note(signal.SIGTERM)
    now[0] = 50.0
    stop._note(signal.SIGTERM)
    assert stop._deadline == 95.0


def test_a_signal_just_after_the_ranks_have_agreed_is_for_the_next_time(monkeypatch):
    """This rank knows of it and the others do not: all must get the same answer."""
    stop, late = StopRequest(grace_time=100), [signal.SIGTERM]

    def all_reduce(left, op):
        assert op == dist.ReduceOp.MIN
        while late:
            stop._note(late.pop())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert not stop.agreed()
    assert stop.agreed()


def test_a_run_that_has_not_begun_ends_at_once():
    done = script("with StopRequest(1000):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(1000)")
    assert done.returncode == 75
    assert done.stderr.startswith("megatron-nft: stopped on request before the run had begun;") and done.stderr.count("\n") == 1


def test_a_process_that_hangs_ends_when_the_time_is_over():
    """In a lock of C, which no signal interrupts, so that no handler of Python runs."""
    hang = "import ctypes; c, m = ctypes.CDLL(None), ctypes.create_string_buffer(64); c.pthread_mutex_lock(m)"
    body = f"with StopRequest(1, 'it goes on so') as stop:\n    stop.begin()\n    {hang}; print(flush=True); c.pthread_mutex_lock(m)"
    command = [sys.executable, "-c", HEAD + body]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
        printed = process.stderr.read()
    assert printed.startswith("megatron-nft: the grace time of 1 s is nearly over:") and printed.endswith("; it goes on so\n")


def sleep_long() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_die_of_sigterm_and_the_parent_hears_nothing(method):
    with StopRequest(grace_time=1000) as stop:
        stop.begin()
        child = multiprocessing.get_context(method).Process(target=sleep_long)
        child.start()
        child.terminate()
        child.join(60)
        assert child.exitcode == -signal.SIGTERM
        assert not stop.agreed()


def test_a_helper_leaves_the_signals_to_its_parent():
    done = script("leave_to_parent()\nfor n in (signal.SIGTERM, signal.SIGUSR1):\n    os.kill(os.getpid(), n)\nprint('alive')")
    assert (done.returncode, done.stdout) == (0, "alive\n")
    inherits = "import subprocess; p = subprocess.Popen(['sleep', '1000']); p.terminate(); print(p.wait())"
    assert script(f"leave_to_parent()\n{inherits}").stdout == f"{-signal.SIGTERM}\n"

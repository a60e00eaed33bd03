"""SIGTERM and SIGUSR1: a run is asked to stop, saves what it has, and exits with 75 within checkpoint.grace_time.

A signal only leaves a note and starts the clock. The loop asks, at points that all ranks reach alike, whether any rank has a note, so
that all of them stop at the same one. Where that would take too long (a rank hangs, a phase is long) the process leaves without
a further save: what was complete before stands.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from typing import Self

from megatron_nft import watchdog

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
HOUR = 3600  # seconds; select() takes no number of any size
SHARE = 0.95  # of the grace time until the process leaves as it is
_WAKE, _END = 254, 255  # what is written to the watching thread's pipe, besides the numbers of signals


class Stopped(Exception):
    """The run ends because it was asked to. The text says after which step."""


class StopRequest:
    """Whether this run was asked to stop. As a context manager it takes the two signals; otherwise nobody ever asks.

    Until `begin` is called a signal ends the process at once: a run that has not begun has nothing to save. A second signal changes
    nothing.
    """

    def __init__(self, grace_time: float, goes_on: str = "the same command goes on from the newest checkpoint"):
        """grace_time: seconds from the first signal, on any rank, until this process has ended. goes_on: what the user is told."""
        self._grace_time, self._begun, self.goes_on = grace_time, False, goes_on
        self._deadline = math.inf  # by time.monotonic(); infinite until a signal came
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # A handler waits until the main thread is back in Python, a hung one never is. The number of the signal goes to the pipe at once.
        self._fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)
        self._thread.start()
        _current.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _current.remove(self)
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():  # a process that ends on request is not to die of a further one on its last steps
            signal.signal(number, signal.SIG_IGN if self.requested else handler)
        self._wake(_END)
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None

    def begin(self) -> None:
        """From here on the run asks, and a signal no longer ends the process at once."""
        self._begun = True

    @property
    def requested(self) -> bool:
        """Whether this rank knows of a request."""
        return self._deadline < math.inf

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective where there are several ranks: all get the same answer, and the same deadline."""
        import torch
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > 1:
            left = torch.tensor(self._deadline - time.monotonic(), dtype=torch.float64)  # on the CPU: over gloo
            dist.all_reduce(left, dist.ReduceOp.MIN)
            self._set_deadline(time.monotonic() + left.item())
            return left.item() < math.inf  # not self.requested: a signal since then is known to this rank alone
        return self.requested

    def _note(self, number: int, frame: object = None) -> None:
        """A signal came. Called by the handler or by the watching thread, whichever is first, and later by the other."""
        self._set_deadline(time.monotonic() + SHARE * self._grace_time)

    def _set_deadline(self, deadline: float) -> None:
        if deadline < self._deadline:  # the first request counts
            self._deadline = deadline
            if self._pipe is not None:
                self._wake(_WAKE)

    def _wake(self, byte: int) -> None:
        os.write(self._pipe[1], bytes([byte]))

    def _watch(self) -> None:
        """The thread: ends the process when the time is over, whatever the main thread is in."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._leave(f"the grace time of {self._grace_time} s is nearly over: stopped on request without a further save")
            if not select.select([self._pipe[0]], [], [], None if left == math.inf else min(left, HOUR))[0]:
                continue
            for byte in os.read(self._pipe[0], 64):
                if byte == _END:
                    return
                if byte in SIGNALS:
                    self._note(byte)
            if self.requested and not self._begun:
                self._leave("stopped on request before the run had begun")

    def _leave(self, what: str) -> None:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"megatron-nft: {rank}{what}; {self.goes_on}", file=sys.stderr, flush=True)
        watchdog.take_leave()
        os._exit(EXIT_CODE)  # no teardown: it could hang like the rest


_current: list[StopRequest] = []


_masks: list[set[int]] = []  # of the thread that forks


def _hold() -> None:
    """Before a fork: a signal that the child gets before it has forgotten the handler would end in the parent's pipe."""
    if _current:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _go_on() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forget() -> None:
    """In a forked child: its parent's request is none of its own, so that it dies of SIGTERM."""
    if _current:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _current.clear()
    _go_on()


os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_forget)


def leave_to_parent() -> None:
    """For a helper process: the two signals, which launchers send to all processes of a job, are the parent's to answer."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which a program started from here would inherit

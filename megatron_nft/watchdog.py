"""Ends a process that makes no progress, and says where it hung: rank, phase, seconds, and the stacks of all threads.

A thread looks whether the running phase has had a beat within its limit. A main thread that is stuck in C with the interpreter's lock
never lets that thread run; for it there is faulthandler's timer, a C thread without the lock, which writes the stacks into the pipe of a
small process of ours. That process knows the phase, and writes both where they belong. It also outlives a process that is killed, and says
in which phase that was: who else could, where the system's memory killer or a node's administrator leaves no word?

One watchdog a process: `phase`, `reach` and `beat` mean the one that is in force, and do nothing where there is none.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
STUCK_EXIT_CODE = 1  # where Python itself is stuck: faulthandler knows no other
LOOKS = 10  # a limit: how often the thread looks
LATE = 1.0  # seconds that the timer leaves to the thread, whose report has the better exit code
TORCHS = timedelta(minutes=30)  # that gloo and NCCL wait unless told otherwise
_MARK = "\0"  # of a line that names the phase: no line of faulthandler's begins so


class Watchdog:
    """Watches this process while it is entered. It is always in a phase: "start" at first, then what `reach` and `phase` say."""

    def __init__(self, limit_seconds: float, rank: int, run_dir: str | Path, phases: Mapping[str, float] | None = None):
        """limit_seconds: how long a phase may go without a beat, 0: without end; phases: another limit for some, by name.

        The stacks go to stderr and to run_dir/stacks-rank<rank>.txt.
        """
        self._limit, self._rank, self._phases = limit_seconds, rank, dict(phases or {})
        self._file = Path(run_dir).absolute() / f"stacks-rank{rank}.txt"
        self._names = ["start"]  # the running phase is the last; the first is what remains when all others have ended
        self._last = time.monotonic()  # the last beat
        self._watched: float | None = None  # the limit that thread and timer know
        self._changed, self._ended = threading.Condition(), False

    def __enter__(self) -> Self:
        command = [sys.executable, "-I", "-S", __file__, str(self._file)]
        self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._out = self._helper.stdin.fileno()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        _current.append(self)
        self.beat()
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        _current.remove(self)
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.take_leave()
        self._helper.stdin.close()
        self._helper.wait()

    def take_leave(self) -> None:
        """This process ends by itself, and has said why."""
        self._tell_helper(f"{_MARK}\n")

    def forget(self) -> None:
        """In a forked child, which is not watched: as long as it held the pipe the helper would not see this process end."""
        self._helper.stdin.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is the phase `name`; afterwards the one around it goes on, both with a fresh beat."""
        self.beat()  # before the limit changes: the thread may look in between
        self._names.append(name)
        self._note()
        try:
            yield
        finally:
            self.beat()
            self._names.pop()
            self._note()

    def reach(self, name: str) -> None:
        """What runs outside of any `phase` is `name` from here on."""
        self.beat()
        self._names[0] = name
        self._note()

    def beat(self) -> None:
        """Progress: the running phase has its whole limit again. Costs next to nothing."""
        self._last = time.monotonic()

    @property
    def running(self) -> str:
        """The phase that runs."""
        return self._names[-1]

    @property
    def limit(self) -> float:
        """Seconds without a beat that the running phase may take; 0: without end."""
        return self._phases.get(self._names[-1], self._limit)

    @property
    def longest(self) -> float:
        """Seconds of the longest limit that there is; 0 where there is none."""
        return max(self._limit, *self._phases.values(), 0.0)

    def _note(self) -> None:
        """Another phase runs. Where its limit is another, the timer is set at once: this thread may be stuck before the other one
        gets to it."""
        self._tell_helper(f"{_MARK}{self._place()}{_MARK}no progress for {self.limit:g} s, stuck outside of Python\n")
        if self.limit != self._watched:
            self._set_timer()
            with self._changed:
                self._changed.notify()

    def _tell_helper(self, line: str) -> None:
        if self._out == sys.__stderr__.fileno():
            return
        try:
            os.write(self._out, line.encode())
        except BrokenPipeError:  # it was killed: the stacks alone, then
            self._out, self._watched = sys.__stderr__.fileno(), None

    def _place(self) -> str:
        return f"megatron-nft: rank {self._rank}: phase {self._names[-1]}: "

    def _set_timer(self) -> None:
        """A whole limit after the next look: the beats until then do not reach the timer, and the last of them may be the last of all."""
        self._watched = limit = self.limit
        if limit:
            faulthandler.dump_traceback_later(limit + limit / LOOKS + LATE, exit=True, file=self._out)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """The thread."""
        with self._changed:
            while not self._ended:
                limit, quiet = self.limit, time.monotonic() - self._last
                if limit and quiet >= limit:
                    self._leave(quiet)
                self._set_timer()
                self._changed.wait(min(limit / LOOKS, limit - quiet) if limit else None)

    def _leave(self, quiet: float) -> None:
        line = f"{self._place()}no progress for {quiet:.0f} s\n".encode()
        try:
            for to in (sys.__stderr__.fileno, self._open_file):
                file = to()
                os.write(file, line)
                faulthandler.dump_traceback(file, all_threads=True)
        finally:  # a full disk does not keep it alive
            self.take_leave()
            os._exit(EXIT_CODE)

    def _open_file(self) -> int:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


_current: list[Watchdog] = []


def _forget() -> None:
    while _current:
        _current.pop().forget()


os.register_at_fork(after_in_child=_forget)


def phase(name: str):
    """Watchdog.phase of the watchdog in force."""
    return _current[-1].phase(name) if _current else nullcontext()


def running() -> str | None:
    """The phase that runs; None where no watchdog is in force."""
    return _current[-1].running if _current else None


def patience() -> timedelta:
    """How long ranks are to wait for one another: half as long again as any phase may take under the watchdog in force, so that the rank
    which hangs is told of before those that wait for it give up; as long as torch would have it at least."""
    return max(TORCHS, timedelta(seconds=1.5 * _current[-1].longest)) if _current else TORCHS


def reach(name: str) -> None:
    """Watchdog.reach of the watchdog in force."""
    if _current:
        _current[-1].reach(name)


def beat() -> None:
    """Watchdog.beat of the watchdog in force."""
    if _current:
        _current[-1].beat()


def take_leave() -> None:
    """Watchdog.take_leave of the watchdog in force: before an os._exit."""
    if _current:
        _current[-1].take_leave()


def _listen(file: str) -> None:
    """The helper: reads which phase runs, until stacks come, or the pipe is closed: the end, for which there is a reason unless a phase
    still runs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # launchers send them to all processes of a job; this one ends with the one it serves
    place = stuck = ""
    for line in sys.stdin:
        if not line.startswith(_MARK):
            report = place + stuck + line + sys.stdin.read()
            sys.stderr.write(report)
            with suppress(OSError):  # no room: it stands in stderr
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                Path(file).write_text(report)
            return
        place, _, stuck = line.rstrip("\n").removeprefix(_MARK).partition(_MARK)
        stuck += "\n"
    if place:
        sys.stderr.write(f"{place}the process is gone: killed, or crashed outside of Python\n")


if __name__ == "__main__":
    _listen(sys.argv[1])

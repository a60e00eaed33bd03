"""The parent's side of a worker process: start it, ask it under a deadline, kill it, start it anew."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

from megatron_nft.errors import UserError
from megatron_nft.rewards.functions import Kind
from megatron_nft.trajectories import Verdict

START_LIMIT = 120  # seconds to import the verdict functions on a busy machine
TIMED_OUT, CRASHED = Verdict(0.0, "timed_out"), Verdict(0.0, "crashed")


class Call(NamedTuple):
    """What a verdict function is asked; equal calls have equal verdicts."""

    function: str
    response: str
    answers: tuple[str, ...]  # the gold answers
    prompt: tuple[tuple[str, str], ...] | None  # (id, question, source), for a function that takes them

    def line(self, number: int = 0) -> bytes:
        """As a worker reads it."""
        prompt = None if self.prompt is None else dict(self.prompt)
        return json.dumps(self._asdict() | {"prompt": prompt, "id": number}).encode() + b"\n"


@dataclass(frozen=True)
class Setup:
    """What a worker process is started with."""

    functions: list[str]
    time_limit: float
    memory_limit: int  # bytes

    def spawn(self, overlapping: bool = False) -> subprocess.Popen:
        """Start a worker process: a fresh interpreter, nothing of the parent is forked or imported again. It dies with this thread."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_nft.rewards.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
            start_new_session=True,  # Ctrl-C is the parent's; and one signal kills the worker with its children
        )  # fmt: skip
        limit = self.time_limit if overlapping else None
        first = {"functions": self.functions, "memory_limit": self.memory_limit, "time_limit": limit}
        with contextlib.suppress(BrokenPipeError):  # it died at once: whoever waits for its first line finds the end of its output
            process.stdin.write(json.dumps(first).encode() + b"\n")
        return process


def kill(process: subprocess.Popen) -> None:
    """Kill a worker and all it started, and wait for its end."""
    if process.returncode is None:  # not reaped yet, so the number is still its own
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def verdict_of(reply: dict) -> tuple[Verdict, str | None]:
    """The verdict of a worker's reply, and how the function crashed where it did.

    Raises UserError when the function returned no number in [0, 1].
    """
    if "user_error" in reply:
        raise UserError(*reply["user_error"])
    if "timed_out" in reply:
        return TIMED_OUT, None
    if "crash" in reply:
        return CRASHED, reply["crash"]
    return Verdict(reply["score"], reply["outcome"], reply["found"]), None


class WorkerProcess:
    """One worker, used by one thread at a time, for one call at a time. `kinds` says how each function is called."""

    def __init__(self, setup: Setup):
        """Start the worker and wait until it has loaded the functions. Raises UserError when one of them cannot be loaded."""
        self._setup = setup
        self._start()

    def judge(self, call: Call) -> tuple[Verdict, str | None]:
        """The verdict, and how the function crashed where it did. A worker that is late is killed; the next call starts another.

        Raises UserError when the function returned no number in [0, 1].
        """
        if self._process.poll() is not None:
            self._start()
        try:
            reply = self._ask(call.line(), self._setup.time_limit)
        except TimeoutError:
            return TIMED_OUT, None
        except EOFError as death:
            return CRASHED, str(death)
        return verdict_of(reply)

    def close(self) -> None:
        """Kill the worker and all it started."""
        kill(self._process)
        self._process.stdin.close()
        self._process.stdout.close()

    def _start(self) -> None:
        self._process = self._setup.spawn()
        names = ", ".join(self._setup.functions)
        try:
            reply = self._ask(b"", START_LIMIT)
        except TimeoutError:
            raise UserError(f"loading the verdict functions {names} took over {START_LIMIT} s", "let their modules import less") from None
        except EOFError as death:
            raise UserError(f"loading the verdict functions {names} failed ({death})", "see the lines above") from None
        if "ready" not in reply:
            self.close()
            raise UserError(*reply["user_error"])
        self.kinds = {name: Kind(**kind) for name, kind in reply["ready"].items()}

    def _ask(self, request: bytes, limit: float) -> dict:
        """Send one line and wait for one. On TimeoutError and on EOFError (the worker died) it has been killed and reaped."""
        deadline = time.monotonic() + limit
        line = bytearray()
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        try:
            self._send(request)
            while not line.endswith(b"\n"):
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise EOFError
                line += piece
        except (BrokenPipeError, EOFError):
            self.close()
            raise EOFError(f"the worker process ended with exit status {self._process.returncode}") from None
        except TimeoutError:
            self.close()
            raise
        return json.loads(line)

    def _send(self, data: bytes) -> None:
        """Write all of it: the worker waits for a line, so it reads while this writes."""
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) :]

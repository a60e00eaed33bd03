"""The parent's side of a worker process: start it, ask it under a deadline, kill it, start it anew."""

import json
import os
import select
import signal
import subprocess
import sys
import time

from megatron_nft.errors import UserError
from megatron_nft.trajectories import Verdict

START_LIMIT = 120  # seconds to import the verdict functions on a busy machine
TIMED_OUT, CRASHED = Verdict(0.0, "timed_out"), Verdict(0.0, "crashed")


class WorkerProcess:
    """One worker, used by one thread at a time. It is a fresh interpreter: nothing of the parent is forked or imported again."""

    def __init__(self, functions: list[str], time_limit: float):
        """Start the worker and wait until it has loaded the functions. Raises UserError when one of them cannot be loaded."""
        self._functions, self._time_limit = functions, time_limit
        self._start()

    def judge(self, function: str, response: str, answer: str) -> tuple[Verdict, str | None]:
        """The verdict, and how the function crashed where it did. A worker that is late is killed; the next call starts another.

        Raises UserError when the function returned no number in [0, 1].
        """
        if self._process.poll() is not None:
            self._start()
        try:
            reply = self._ask({"function": function, "response": response, "answer": answer}, self._time_limit)
        except TimeoutError:
            return TIMED_OUT, None
        except EOFError as death:
            return CRASHED, str(death)
        if "user_error" in reply:
            raise UserError(*reply["user_error"])
        if "crash" in reply:
            return CRASHED, reply["crash"]
        return Verdict(reply["score"], reply["outcome"]), None

    def close(self) -> None:
        """Kill the worker and all it started."""
        if self._process.returncode is None:  # not reaped yet, so the number is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_nft.rewards.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
            start_new_session=True,  # Ctrl-C is the parent's; and one signal kills the worker with its children
        )  # fmt: skip
        names = ", ".join(self._functions)
        try:
            reply = self._ask(self._functions, START_LIMIT)
        except TimeoutError:
            raise UserError(f"loading the verdict functions {names} took over {START_LIMIT} s", "let their modules import less") from None
        except EOFError as death:
            raise UserError(f"loading the verdict functions {names} failed ({death})", "see the lines above") from None
        if reply != "ready":
            self.close()
            raise UserError(*reply["user_error"])

    def _ask(self, request: object, limit: float) -> object:
        """Send one line and wait for one. On TimeoutError and on EOFError (the worker died) it has been killed and reaped."""
        deadline = time.monotonic() + limit
        line = bytearray()
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        try:
            self._send(json.dumps(request).encode() + b"\n")
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
        while data:
            written = self._process.stdin.write(data)
            data = data[written:]

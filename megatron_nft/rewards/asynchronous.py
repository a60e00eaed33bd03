"""The parent's side of async verdict functions: many calls at a time in each worker process, each under its deadline.

A worker cancels a call that is late and goes on. What it cannot do is get rid of a function that blocks its event loop, goes on when it
is cancelled, or takes the process down. Then every call that was under way in it is a suspect, and all but one are innocent: they are
made once more, one at a time, in a worker apart, so that only the culprit is counted as timed out or crashed.
"""

import asyncio
import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from megatron_nft.errors import UserError
from megatron_nft.rewards.process import CRASHED, START_LIMIT, TIMED_OUT, Call, Setup, kill, verdict_of
from megatron_nft.trajectories import Verdict

GRACE = 1.0  # seconds that a worker has to say that it cancelled a call
_LONGEST_REPLY = 1 << 20  # bytes

Crash = Callable[[str, str], None]  # is told of (function, what happened)


class Lost(Exception):
    """The worker did not come back from a call: late, or dead (`why`)."""

    def __init__(self, verdict: Verdict, why: str | None = None):
        super().__init__(why)
        self.verdict, self.why = verdict, why


class AsyncWorkers:
    """`submit` calls of async functions; no more than `concurrency` are under way in each of `number` workers, the others wait."""

    def __init__(self, setup: Setup, functions: list[str], number: int, concurrency: int, on_crash: Crash):
        setup = replace(setup, functions=functions)
        self._workers, self._apart = [_Worker(setup) for _ in range(number)], _Worker(setup)
        self._slots, self._one_apart = asyncio.Semaphore(number * concurrency), asyncio.Lock()
        self._on_crash = on_crash
        self._waiting: set[asyncio.Task] = set()  # for a slot
        self._under_way: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="async judge", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> "Future[Verdict]":
        """The verdict to come. Raises UserError through the future when the function returned no number in [0, 1]."""
        return asyncio.run_coroutine_threadsafe(self._judge(call), self._loop)

    def close(self) -> None:
        """Let the calls under way end (within their limit), cancel those that wait, kill the workers."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for task in list(self._waiting):
            task.cancel()
        await asyncio.gather(*self._waiting, *self._under_way, return_exceptions=True)
        for worker in (*self._workers, self._apart):
            await worker.end()

    async def _judge(self, call: Call) -> Verdict:
        task = asyncio.current_task()
        self._waiting.add(task)
        try:
            async with self._slots:
                self._waiting.discard(task)
                self._under_way.add(task)
                return await self._ask(call)
        finally:
            self._waiting.discard(task)
            self._under_way.discard(task)

    async def _ask(self, call: Call) -> Verdict:
        try:
            reply = await min(self._workers, key=lambda worker: worker.load).ask(call)
        except Lost:
            try:
                async with self._one_apart:
                    reply = await self._apart.ask(call)
            except Lost as lost:
                if lost.why:
                    self._on_crash(call.function, lost.why)
                return lost.verdict
        verdict, crash = verdict_of(reply)
        if crash:
            self._on_crash(call.function, crash)
        return verdict


class _Worker:
    """One process with calls that overlap, started at the first and again when it is gone. Lives in one event loop."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._numbers = itertools.count()
        self._replies: dict[int, asyncio.Future[dict]] = {}
        self._process: subprocess.Popen | None = None
        self._starting = asyncio.Lock()
        self.load = 0  # calls under way

    async def ask(self, call: Call) -> dict:
        """The worker's reply. Raises Lost; after that another process is started for the next call."""
        self.load += 1
        number = next(self._numbers)
        process = None
        try:
            process = await self._be_started()
            reply = self._replies[number] = asyncio.get_running_loop().create_future()
            self._requests.write(call.line(number))
            async with asyncio.timeout(self._setup.time_limit + GRACE):
                return await reply
        except TimeoutError:
            if process is self._process:
                await self.end()
            raise Lost(TIMED_OUT) from None
        finally:
            self.load -= 1
            self._replies.pop(number, None)

    async def end(self) -> None:
        """Kill the process; what is under way in it is lost."""
        process, self._process = self._process, None
        if process is not None:
            self._requests.close()
            kill(process)
            self._lose(process.returncode)
            if self._listening is not asyncio.current_task():
                await self._listening

    async def _be_started(self) -> subprocess.Popen:
        async with self._starting:
            if self._process is None:
                await self._start()
            return self._process

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        process, replies = self._setup.spawn(overlapping=True), asyncio.StreamReader(_LONGEST_REPLY)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(replies), process.stdout)
        self._requests, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        first = b""
        with contextlib.suppress(TimeoutError):
            first = await asyncio.wait_for(replies.readline(), START_LIMIT)
        reply = json.loads(first or "{}")
        if "ready" not in reply:
            self._requests.close()
            kill(process)
            if "user_error" in reply:
                raise UserError(*reply["user_error"])
            raise Lost(CRASHED, f"the worker process did not start (exit status {process.returncode})")
        self._process = process
        self._listening = loop.create_task(self._listen(process, replies))

    async def _listen(self, process: subprocess.Popen, replies: asyncio.StreamReader) -> None:
        while line := await replies.readline():
            reply = json.loads(line)
            waiting = self._replies.get(reply.get("id"))
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)
        if process is self._process:  # it died by itself
            await self.end()

    def _lose(self, status: int) -> None:
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(Lost(CRASHED, f"the worker process ended with exit status {status}"))

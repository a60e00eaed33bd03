"""Judge: takes responses while generation runs, and gives verdicts, each within a time limit."""

import logging
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.rewards.answer_line import dapo
from megatron_nft.rewards.asynchronous import AsyncWorkers
from megatron_nft.rewards.boxed import strict_box
from megatron_nft.rewards.functions import Kind, best
from megatron_nft.rewards.prepared import settle_cheaply
from megatron_nft.rewards.process import Call, Setup, WorkerProcess
from megatron_nft.trajectories import OUTCOMES, Prompt, Verdict

CACHE_SIZE = 1024  # verdicts kept; equal answers mostly come from one group
LONGEST_CACHED = 100_000  # characters of a response: the cache is not to hold gigabytes

Golds = tuple[str, ...]


def _settled(function: Callable[[str, str], Verdict]) -> Callable[[str, Golds], Verdict]:
    return lambda response, golds: best([function(response, gold) for gold in golds])


# What is so cheap, and sure to end, that it is done in this process: a verdict, or what a worker has to judge.
_IN_PROCESS: dict[str, Callable[[str, Golds], Verdict | tuple[str, Golds]]] = {
    "strict_box": _settled(strict_box),
    "dapo": _settled(dapo),
    "math_verify": settle_cheaply,
}
_NEEDS_NO_WORKER = {"strict_box", "dapo"}

_log = logging.getLogger(__name__)


class Judge:
    """Verdicts of responses, by the function that the prompt names, or else the default.

    Worker processes are started only where a function needs them (strict_box and dapo do not). A verdict that takes longer than
    `time_limit` seconds is "timed_out", a function that raises or a worker that dies is "crashed": both score 0.

    >>> with Judge((), "strict_box", workers=2, time_limit=2) as judge:
    ...     judge.submit("so it is \\\\boxed{7}", Prompt("1", "3+4?", "7", (), "sums")).result().outcome
    'right'
    """

    def __init__(
        self,
        functions: Iterable[str],
        default: str,
        workers: int,
        time_limit: float,
        concurrency: int = 32,
        memory_limit: int = 4,
    ):
        """`functions`: those that prompts may name, besides the default.

        workers: processes. concurrency: calls of an async function at a time in each. memory_limit: GiB of each.
        Returns when all workers have loaded the functions. Raises UserError for one that cannot be loaded.
        """
        self.counts = _zero_counts()
        self._names, self._default = {default, *functions}, default
        self._lock = threading.Lock()
        self._cache: OrderedDict[Call, Future[Verdict]] = OrderedDict()
        self._reported: set[str] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._workers: list[WorkerProcess] = []
        self._kinds: dict[str, Kind] = {}
        self._async: AsyncWorkers | None = None
        needy = sorted(self._names - _NEEDS_NO_WORKER)
        if needy:
            self._start_workers(Setup(needy, time_limit, memory_limit << 30), workers, concurrency)

    @classmethod
    def for_config(cls, config: Config, training: bool = True) -> Self:
        """The judge of a run: reward.function, and the functions that data sets ask for, whole or by source. training: those of data.train,
        too."""
        reward, datasets = config.reward, [*(config.data.train if training else ()), *config.evaluation.sets]
        named = [(dataset.reward, *dataset.rewards.values()) for dataset in datasets]
        functions = {name for names in named for name in names if name}
        return cls(functions, reward.function, reward.workers, reward.time_limit, reward.concurrency, reward.memory_limit)

    def submit(self, response: str, prompt: Prompt) -> "Future[Verdict]":
        """Ask for the verdict of one response: the best over the prompt's gold answers. Equal calls are judged once, counted each time.

        The future raises UserError when the verdict function returned no number in [0, 1]. Raises UserError when the prompt names a
        function that was not loaded.
        """
        function = prompt.reward or self._default
        if function not in self._names:
            raise UserError(f"prompt {prompt.id} wants the verdict function {function!r}, which no data set of the config names",
                            "name it there (reward or rewards), or as reward.function")  # fmt: skip
        answered: Future[Verdict] = Future()
        text, golds = response, prompt.golds
        if function in _IN_PROCESS:
            settled = _IN_PROCESS[function](response, golds)
            if isinstance(settled, Verdict):
                self._count(settled)
                answered.set_result(settled)
                return answered
            text, golds = settled
        details = (("id", prompt.id), ("question", prompt.question), ("source", prompt.source))
        call = Call(function, text, golds, details if self._kinds[function].takes_prompt else None)
        self._ask_once(call).add_done_callback(lambda judged: self._deliver(judged, answered))
        return answered

    def take_counts(self) -> dict[str, int]:
        """How many verdicts of each outcome there were since the last call; starts again from 0."""
        with self._lock:
            counts, self.counts = self.counts, _zero_counts()
        return dict(counts)

    def close(self) -> None:
        """Let running verdicts end (within the time limit), cancel those that wait, kill the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        if self._async is not None:
            self._async.close()
            self._async = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_workers(self, setup: Setup, number: int, concurrency: int) -> None:
        """Start all at once, in the pool's threads: they last as long as the pool, and a worker dies with its thread."""
        started = [self._pool.submit(WorkerProcess, setup) for _ in range(number)]
        failures = [future.exception() for future in started]
        self._workers = [future.result() for future, failure in zip(started, failures, strict=True) if failure is None]
        if any(failures):
            self.close()
            raise next(filter(None, failures))
        self._kinds = self._workers[0].kinds
        overlapping = [name for name, kind in self._kinds.items() if kind.is_async]
        if overlapping:
            self._async = AsyncWorkers(setup, overlapping, number, concurrency, self._report)
        if len(overlapping) == len(self._kinds):  # these have told the kinds and have nothing more to do
            while self._workers:
                self._workers.pop().close()
        for worker in self._workers:
            self._idle.put(worker)

    def _ask_once(self, call: Call) -> "Future[Verdict]":
        """The verdict of a worker, under way or from the cache (least recently used go first)."""
        if len(call.response) > LONGEST_CACHED:
            return self._ask(call)
        with self._lock:
            if call not in self._cache or self._is_worth_another_try(call):
                self._cache[call] = self._ask(call)
            self._cache.move_to_end(call)
            judged = self._cache[call]
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        return judged

    def _ask(self, call: Call) -> "Future[Verdict]":
        return self._async.submit(call) if self._kinds[call.function].is_async else self._pool.submit(self._ask_worker, call)

    def _is_worth_another_try(self, call: Call) -> bool:
        """A remote judge that was out of reach may be back; a function that computes would fail again."""
        judged = self._cache[call]
        failed = judged.done() and not judged.cancelled() and not judged.exception() and judged.result().score == 0.0
        return failed and self._kinds[call.function].is_async and judged.result().outcome in ("timed_out", "crashed")

    def _ask_worker(self, call: Call) -> Verdict:
        """Runs in a thread of the pool. There are as many workers as threads, so one is idle."""
        worker = self._idle.get()
        try:
            verdict, crash = worker.judge(call)
        finally:
            self._idle.put(worker)
        if crash:
            self._report(call.function, crash)
        return verdict

    def _report(self, function: str, crash: str) -> None:
        if function not in self._reported:
            self._reported.add(function)
            _log.warning("verdict function %s crashed, so the answer scores 0 (further crashes are only counted): %s", function, crash)

    def _deliver(self, judged: "Future[Verdict]", answered: "Future[Verdict]") -> None:
        """Count first, then hand over: whoever has the verdict finds it counted."""
        if judged.cancelled():
            answered.cancel()
        elif answered.set_running_or_notify_cancel():
            if judged.exception():
                answered.set_exception(judged.exception())
            else:
                self._count(judged.result())
                answered.set_result(judged.result())

    def _count(self, verdict: Verdict) -> None:
        with self._lock:
            self.counts[verdict.outcome] += 1


def _zero_counts() -> Counter[str]:
    return Counter(dict.fromkeys(OUTCOMES, 0))

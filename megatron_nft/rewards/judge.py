"""Judge: takes responses while generation runs, and gives verdicts, each within a time limit."""

import logging
import queue
import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from megatron_nft.config import Config, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.rewards.boxed import compare_integers, strict_box
from megatron_nft.rewards.process import WorkerProcess
from megatron_nft.trajectories import OUTCOMES, Prompt, Verdict

CACHE_SIZE = 1024  # verdicts kept; equal answers mostly come from one group
# What is so cheap, and sure to end, that it is done in this process: a verdict, or the text that a worker has to judge.
_IN_PROCESS = {"strict_box": strict_box, "math_verify": compare_integers}

_log = logging.getLogger(__name__)


class Judge:
    """Verdicts of responses, by the function of the prompt's source.

    Worker processes are started only where a function needs them (strict_box does not). A verdict that takes longer than
    `time_limit` seconds is "timed_out", a function that raises or a worker that dies is "crashed": both score 0.

    >>> with Judge({}, "strict_box", workers=2, time_limit=2) as judge:
    ...     judge.submit("so it is \\\\boxed{7}", Prompt("1", "3+4?", "7", (), "sums")).result().outcome
    'right'
    """

    def __init__(self, functions: dict[str, str | None], default: str, workers: int, time_limit: float):
        """`functions` names the verdict function of a source; a source not in it, or with None, has the default.

        Returns when all workers have loaded the functions. Raises UserError for one that cannot be loaded.
        """
        self.counts = _zero_counts()
        self._functions, self._default = functions, default
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str, str], Future[Verdict]] = OrderedDict()
        self._reported: set[str] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._workers: list[WorkerProcess] = []
        remote = sorted({default, *filter(None, functions.values())} - {"strict_box"})
        if remote:
            self._start_workers(remote, workers, time_limit)

    @classmethod
    def for_config(cls, config: Config) -> Self:
        """The judge of a run: reward.function, and the functions that single data sets ask for."""
        functions: dict[str, str | None] = {}
        for dataset in [*config.data.train, *config.evaluation.sets]:
            name = dataset_name(dataset)
            if functions.setdefault(name, dataset.reward) != dataset.reward:
                raise UserError(f"two data sets with the name {name} have different verdict functions", "give each its own `name`")
        return cls(functions, config.reward.function, config.reward.workers, config.reward.time_limit)

    def submit(self, response: str, prompt: Prompt) -> "Future[Verdict]":
        """Ask for the verdict of one response. Equal (response, answer, function) are judged once, counted each time.

        The future raises UserError when the verdict function returned no number in [0, 1].
        """
        function = self._functions.get(prompt.source) or self._default
        answered: Future[Verdict] = Future()
        text = response
        if function in _IN_PROCESS:
            quick = _IN_PROCESS[function](response, prompt.answer)
            if isinstance(quick, Verdict):
                self._count(quick)
                answered.set_result(quick)
                return answered
            text = quick
        self._ask_once(function, text, prompt.answer).add_done_callback(lambda judged: self._deliver(judged, answered))
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_workers(self, functions: list[str], number: int, time_limit: float) -> None:
        """Start all at once, in the pool's threads: they last as long as the pool, and a worker dies with its thread."""
        started = [self._pool.submit(WorkerProcess, functions, time_limit) for _ in range(number)]
        failures = [future.exception() for future in started]
        self._workers = [future.result() for future, failure in zip(started, failures, strict=True) if failure is None]
        if any(failures):
            self.close()
            raise next(filter(None, failures))
        for worker in self._workers:
            self._idle.put(worker)

    def _ask_once(self, function: str, response: str, answer: str) -> "Future[Verdict]":
        """The verdict of a worker, under way or from the cache (least recently used go first)."""
        key = (function, response, answer)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = self._pool.submit(self._ask_worker, *key)
            self._cache.move_to_end(key)
            judged = self._cache[key]
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        return judged

    def _ask_worker(self, function: str, response: str, answer: str) -> Verdict:
        """Runs in a thread of the pool. There are as many workers as threads, so one is idle."""
        worker = self._idle.get()
        try:
            verdict, crash = worker.judge(function, response, answer)
        finally:
            self._idle.put(worker)
        if crash and function not in self._reported:
            self._reported.add(function)
            _log.warning("verdict function %s crashed, so the answer scores 0 (further crashes are only counted): %s", function, crash)
        return verdict

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

"""What an engine did while answers were sampled, by vLLM's own statistics of its scheduler steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

MAXIMA = ("running_max", "waiting_max")  # over engines, these stay maxima


class Throughput:
    """Counts what a vLLM engine reports of every scheduler step: in place of vLLM's loggers, which nobody reads here.

    The engine must have been started with disable_log_stats=False.
    """

    def __init__(self, llm_engine: Any):
        """llm_engine: vLLM's LLMEngine."""
        llm_engine.logger_manager = self
        self._seconds: dict[str, float] = {}  # of sleep, wake, sync
        self.begin()

    def begin(self) -> None:
        """A rollout begins: what the engine did since `take` (validation, log-probs of fixed prompts) is none of it."""
        self._started = time.perf_counter()
        self._steps = self._generated = self._prompt = self._preempted = 0
        self._running, self._waiting = [0, 0], [0, 0]  # sum over steps, maximum
        self._queries = self._hits = 0  # of the prefix cache, in tokens
        self._drafted = self._accepted = 0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds inside to engine/<name>_seconds of the next `take`."""
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The statistics since `begin`, and the seconds of sleep, wake and sync since the last `take`; begins anew."""
        seconds, steps = time.perf_counter() - self._started, max(self._steps, 1)
        found = {
            "tokens_per_second": self._generated / seconds,
            "prompt_tokens": self._prompt,
            "running_mean": self._running[0] / steps,
            "running_max": self._running[1],
            "waiting_mean": self._waiting[0] / steps,
            "waiting_max": self._waiting[1],
            "preempted": self._preempted,
            **({"prefix_cache_hit_share": self._hits / self._queries} if self._queries else {}),
            **({"draft_tokens": self._drafted, "acceptance": self._accepted / self._drafted} if self._drafted else {}),
            **{f"{name}_seconds": value for name, value in self._seconds.items()},
        }
        self._seconds = {}
        self.begin()
        return found

    # ---- what vLLM calls

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        """After every scheduler step; iteration_stats is None where the step wrote nothing."""
        if scheduler_stats is not None:
            self._steps += 1
            for counts, number in ((self._running, scheduler_stats.num_running_reqs), (self._waiting, scheduler_stats.num_waiting_reqs)):
                counts[:] = counts[0] + number, max(counts[1], number)
            self._queries += scheduler_stats.prefix_cache_stats.queries
            self._hits += scheduler_stats.prefix_cache_stats.hits
            if (drafts := scheduler_stats.spec_decoding_stats) is not None:
                self._drafted += drafts.num_draft_tokens
                self._accepted += drafts.num_accepted_tokens
        if iteration_stats is not None:
            self._generated += iteration_stats.num_generation_tokens
            self._prompt += iteration_stats.num_prompt_tokens
            self._preempted += iteration_stats.num_preempted_reqs

    def log(self) -> None:
        """vLLM's wish to print."""

    def record_sleep_state(self, is_awake: int = 0, level: int = 0) -> None:
        """vLLM's word of sleep, which `timed` measures."""


def over_engines(parts: list[dict[str, float]]) -> dict[str, float]:
    """Statistics of all engines, as `take` gives them, in one, under engine/<name>: tokens_per_second of each and of all, of the rest the
    mean, of maxima the maximum."""
    names = dict.fromkeys(name for part in parts for name in part if name != "tokens_per_second")
    found = {f"engine/{index}/tokens_per_second": part["tokens_per_second"] for index, part in enumerate(parts)}
    found["engine/tokens_per_second"] = sum(part["tokens_per_second"] for part in parts)
    for name in names:
        values = [part[name] for part in parts if name in part]
        found[f"engine/{name}"] = float(max(values) if name in MAXIMA else np.mean(values))
    return found

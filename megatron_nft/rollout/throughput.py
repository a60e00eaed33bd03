"""What an engine did while answers were sampled, by vLLM's own statistics of its scheduler steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_nft import watchdog

MAXIMA = ("running_max", "waiting_max")  # over engines, these stay maxima


class Throughput:
    """Counts what an engine's core puts out at every scheduler step.

    vLLM's own loggers, which nobody reads here, are taken out: their bookkeeping of every token costs 2 to 3 % of a small model's time.
    The engine must have been started with disable_log_stats=False, which makes the scheduler count.
    """

    def __init__(self, llm_engine: Any):
        """llm_engine: vLLM's LLMEngine, its core in this process."""
        llm_engine.logger_manager, llm_engine.log_stats, llm_engine.output_processor.log_stats = None, False, False
        core, get_output = llm_engine.engine_core, llm_engine.engine_core.get_output

        def counted() -> Any:
            started = time.perf_counter()
            outputs = get_output()
            self._busy += time.perf_counter() - started
            self._count(outputs)
            return outputs

        core.get_output = counted
        self._seconds: dict[str, float] = {}  # of sleep, wake, sync
        self.begin()

    def begin(self) -> None:
        """A rollout begins: what the engine did since `take` (validation, log-probs of fixed prompts) is none of it."""
        self._started = time.perf_counter()
        self._steps = self._generated = self._prompt = self._preempted = 0
        self._busy = 0.0  # seconds in the engine's own steps, waits for other engines left out but for a mixture's, whose steps they share
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
            "busy_seconds": self._busy,
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

    def _count(self, outputs: Any) -> None:
        """vLLM's EngineCoreOutputs of one step."""
        watchdog.beat()
        stats = outputs.scheduler_stats
        if stats is not None:
            self._steps += 1
            for counts, number in ((self._running, stats.num_running_reqs), (self._waiting, stats.num_waiting_reqs)):
                counts[:] = counts[0] + number, max(counts[1], number)
            self._queries += stats.prefix_cache_stats.queries
            self._hits += stats.prefix_cache_stats.hits
            if (drafts := stats.spec_decoding_stats) is not None:
                self._drafted += drafts.num_draft_tokens
                self._accepted += drafts.num_accepted_tokens
        for output in outputs.outputs:
            self._generated += len(output.new_token_ids)
            if (prefill := getattr(output, "prefill_stats", None)) is not None:  # of an answer's first step; not in every version
                self._prompt += prefill.num_prompt_tokens
            if output.events:
                self._preempted += sum(event.type.name == "PREEMPTED" for event in output.events)


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

"""torch.profiler's traces of the steps, ranks and stages that config.profile names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy.exhausted import record_allocations
from megatron_nft.policy.topology import world_size


def check_profiled_ranks(config: Config) -> None:
    """Raise UserError for a rank that this run has not."""
    missing = [rank for rank in config.profile.ranks if rank >= world_size()]
    if config.profile.steps and missing:
        raise UserError(f"profile.ranks has {missing[0]}, and this run has {world_size()} ranks, from 0 on", "leave it out")


class Profiler:
    """Of one rank. Where nothing is to be traced, `step` and `stage` do nothing."""

    def __init__(self, config: Config, rank: int):
        settings = config.profile
        self._steps = frozenset(settings.steps if rank in settings.ranks else ())
        self._stages, self._rank = frozenset(settings.stages), rank
        self._directory = Path(config.run_dir) / "profile"
        self._step: int | None = None  # that is traced
        if settings.memory_history:
            record_allocations()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A rollout step; its trace is written at the end, unless an error ends it."""
        self._step = step if step in self._steps else None
        try:
            with self._traced("") if self._step is not None and not self._stages else nullcontext():
                yield
        finally:
            self._step = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the step, under its name in the trace."""
        if self._step is None or (self._stages and name not in self._stages):
            yield
            return
        with self._traced(f"-{name}") if self._stages else nullcontext(), record_function(name):
            yield

    @contextmanager
    def _traced(self, ending: str) -> Iterator[None]:
        path = self._directory / f"step_{self._step}-rank{self._rank}{ending}.json.gz"
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with profile(activities=[ProfilerActivity.CPU, *gpu]) as trace:
            yield
        self._directory.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        trace.export_chrome_trace(str(part))
        os.replace(part, path)

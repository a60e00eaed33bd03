"""The seconds of this rank's own passes through the model, without what it waits for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Busy:
    """Times pieces of work: on a GPU by events in its stream, which cost no wait; they are read when the work is over."""

    def __init__(self):
        self.begin()

    def begin(self) -> None:
        """Forget what was timed so far."""
        self._seconds, self._events = 0.0, []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What runs inside counts."""
        if torch.cuda.is_available():
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Of all that was timed since `begin`. Waits for the GPU where it is not through yet."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events = []
        return self._seconds

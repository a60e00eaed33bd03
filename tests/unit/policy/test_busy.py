"""A rank's own seconds, by the clock and by a stand-in for a GPU's events."""

import time

import torch

from megatron_nft.policy.busy import Busy


def test_pieces_add_up_and_what_is_between_them_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    busy = Busy()
    for seconds in (1.0, 2.0):
        with busy.timed():
            now[0] += seconds
        now[0] += 10.0
    assert busy.seconds == 3.0 == busy.seconds
    busy.begin()
    assert busy.seconds == 0.0


def test_a_gpus_events_are_read_at_the_end(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number = len(log)

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    busy = Busy()
    for _ in range(2):
        with busy.timed():
            pass
    assert log == ["record"] * 4  # the work goes on without a wait
    assert busy.seconds == 3.0 == busy.seconds
    assert log == ["record"] * 4 + ["wait"] * 2

"""What an engine did, counted from what its core puts out."""

from types import SimpleNamespace

import pytest

from megatron_nft.rollout.throughput import Throughput, over_engines


def output(tokens: int, prompt: int | None = None, events: tuple[str, ...] = ()) -> SimpleNamespace:
    prefill = None if prompt is None else SimpleNamespace(num_prompt_tokens=prompt)
    told = [SimpleNamespace(type=SimpleNamespace(name=name)) for name in events]
    return SimpleNamespace(new_token_ids=[7] * tokens, prefill_stats=prefill, events=told or None)


def stats(running: int, waiting: int, queries: int = 0, hits: int = 0, drafts: tuple[int, int] | None = None) -> SimpleNamespace:
    spec = drafts and SimpleNamespace(num_draft_tokens=drafts[0], num_accepted_tokens=drafts[1])
    return SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, spec_decoding_stats=spec,
                           prefix_cache_stats=SimpleNamespace(queries=queries, hits=hits))  # fmt: skip


def engine(*steps: tuple, clock: list[float], seconds: float = 0.0) -> SimpleNamespace:
    """vLLM's LLMEngine as far as it is touched: its core puts out these steps, (statistics, outputs) each, and takes seconds for each."""
    left = iter(steps)

    def get_output() -> SimpleNamespace:
        clock[0] += seconds
        return SimpleNamespace(**dict(zip(("scheduler_stats", "outputs"), next(left))))

    core = SimpleNamespace(get_output=get_output)
    return SimpleNamespace(engine_core=core, logger_manager=object(), log_stats=True, output_processor=SimpleNamespace(log_stats=True))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_steps_are_counted_and_handed_on(clock):
    steps = [
        (stats(2, 5, queries=40, hits=10), [output(1, prompt=20), output(1, prompt=20)]),
        (stats(4, 0, drafts=(6, 3)), [output(3), output(1, events=("QUEUED", "PREEMPTED", "SCHEDULED"))]),
        (stats(0, 0), []),
        (None, []),
    ]
    llm = engine(*steps, clock=clock, seconds=0.25)
    throughput = Throughput(llm)
    assert llm.logger_manager is None and not llm.log_stats and not llm.output_processor.log_stats
    assert [llm.engine_core.get_output().outputs for _ in steps] == [outputs for _, outputs in steps]
    clock[0] = 2.0
    assert throughput.take() == {
        "tokens_per_second": 3.0,
        "busy_seconds": 1.0,
        "prompt_tokens": 40,
        "running_mean": 2.0,
        "running_max": 4,
        "waiting_mean": 5 / 3,
        "waiting_max": 5,
        "preempted": 1,
        "prefix_cache_hit_share": 0.25,
        "draft_tokens": 6,
        "acceptance": 0.5,
    }


def test_what_was_before_the_rollout_is_none_of_it_but_sleep_and_sync(clock):
    llm = engine((stats(9, 9, queries=5, hits=5), [output(100)]), (stats(1, 0), [output(8)]), clock=clock)
    throughput = Throughput(llm)
    for seconds in (1.0, 0.5):
        with throughput.timed("sync"):
            clock[0] += seconds
    llm.engine_core.get_output()
    throughput.begin()
    llm.engine_core.get_output()
    clock[0] += 4.0
    taken = throughput.take()
    assert (taken["tokens_per_second"], taken["running_max"], taken["sync_seconds"]) == (2.0, 1, 1.5)
    assert "prefix_cache_hit_share" not in taken and "acceptance" not in taken
    clock[0] += 1.0
    taken = throughput.take()
    assert (taken["tokens_per_second"], taken["running_mean"]) == (0.0, 0.0) and "sync_seconds" not in taken


def test_over_engines():
    parts = [
        {"tokens_per_second": 100.0, "running_max": 5, "running_mean": 2.0, "sleep_seconds": 1.0},
        {"tokens_per_second": 50.0, "running_max": 7, "running_mean": 4.0, "acceptance": 0.5},
    ]
    assert over_engines(parts) == {
        "engine/0/tokens_per_second": 100.0,
        "engine/1/tokens_per_second": 50.0,
        "engine/tokens_per_second": 150.0,
        "engine/running_max": 7,
        "engine/running_mean": 3.0,
        "engine/sleep_seconds": 1.0,
        "engine/acceptance": 0.5,
    }

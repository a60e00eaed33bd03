"""Real vLLM engines with settings that make them faster: what they sample stays what the model says."""

from pathlib import Path

from tests.end_to_end.test_engine import make_model
from tests.support import add_tokenizer, run_ranks


def test_speculation_and_an_fp8_cache(tmp_path):
    """In a process of their own, which has one engine beside another."""
    first, second = (make_model(tmp_path / f"model{seed}", seed) for seed in (0, 1))
    add_tokenizer(first)
    run_ranks(Path(__file__).with_name("fast_engine_worker.py"), 1, {"models": [str(first), str(second)]}, tmp_path)

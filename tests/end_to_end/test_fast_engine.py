"""Real vLLM engines with settings that make them faster: what they sample stays what the model says."""

from pathlib import Path

from tests.end_to_end.test_engine import make_models
from tests.support import run_ranks


def test_speculation_and_an_fp8_cache(tmp_path):
    """In a process of their own, which has one engine beside another."""
    models = [str(model) for model in make_models(tmp_path)]
    run_ranks(Path(__file__).with_name("fast_engine_worker.py"), 1, {"models": models}, tmp_path)

"""A run that was stopped and resumed, on the kernels of a GPU."""

from tests.end_to_end import runs
from tests.gpu.marks import gpu_or_long, needs_vllm

pytestmark = [needs_vllm, gpu_or_long]  # on a CPU see tests/end_to_end/test_stopping.py and test_resume.py


def test_stopped_and_resumed_equals_never_stopped(resumed_run, figures):
    """With megatron.transformer.deterministic_mode: every metric, every answer and its log-probs, parameters, moments and generators are
    the same, bit for bit: a tolerance of 0."""
    straight, parts, steps, half = (resumed_run[key] for key in ("straight", "parts", "steps", "half"))
    assert f"stopped on request after step {half}, saved" in resumed_run["stopped"]
    assert f"resumed after step {half}" in resumed_run["resumed"]
    last = f"checkpoints/step_{steps}"
    entries = [runs.checkpoint_entries(folder / last) for folder in (parts, straight)]
    differing = runs.differences(*entries)
    rows = [[runs.without_times(row) for row in runs.rows(folder)] for folder in (parts, straight)]
    unequal = runs.differences(*rows)
    figures("all 0", steps=steps, entries=len(entries[1]), entries_that_differ=len(differing), metrics_that_differ=len(unequal))
    assert differing == [] and unequal == []
    runs.assert_same_run(parts, straight, steps)
    trained = [row["train/grad_norm"] for row in rows[1] if "train/grad_norm" in row]
    assert len(trained) == steps and all(norm > 0 for norm in trained)

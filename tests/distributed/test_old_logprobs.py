"""The first update of a rollout step makes its own old log-probs: the same as with a pass of their own; and log-probs over two ranks."""

from pathlib import Path

import pytest
import torch

from tests.support import VOCAB, run_ranks, tiny_model

WORKER = Path(__file__).with_name("old_logprobs_worker.py")
CONFIG = """
run_dir: unused
model: {path: PATH}
train: {prompts_per_update: 2, tokens_per_micro_batch: 64}
rollout: {n: 4, prompts_per_step: 4, temperature: 0.9}
objective: {reduction_constant: 100.0}
optimizer: {lr: 1.0, adam_eps: 1.0, clip_grad: 1.0, weight_decay: 0.01}
"""
MASKED = ["objective.correction.method=mask", "objective.correction.level=geometric", "objective.correction.floor=0.1"]
CASES = {
    "none": [],
    "token correction": ["objective.correction.method=truncate", "objective.correction.level=token"],
    "sequence correction": MASKED,
    "one ratio per answer": ["objective.name=gspo", "objective.correction.method=truncate", "objective.correction.level=geometric"],
    # three micro-batches at a time, then what is left
    "joined, sequence correction": [*MASKED, "train.tokens_per_micro_batch=36", "train.logprob_tokens_per_micro_batch=108"],
    "the sampler's": ["train.old_logprobs=rollout"],
}


@pytest.fixture(scope="module", params=[1, 2])
def found(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("old")
    config, output = folder / "config.yaml", folder / "out.pt"
    config.write_text(CONFIG.replace("PATH", str(tiny_model(folder / "model"))))
    arguments = {"config": str(config), "cases": CASES, "output": str(output)}
    arguments["overrides"] = [f"parallel.tensor_model_parallel_size={request.param}"]
    arguments["chunk_bytes"] = 4 * VOCAB * 7  # several chunks in a micro-batch
    run_ranks(WORKER, request.param, arguments, folder)
    return torch.load(output)


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_pass_changes_nothing(case, found):
    """Every total of both updates, what was measured, and the parameters: to 1e-6 relative in float32. The loss is a sum of log-ratios
    of either sign near 0, over the reduction constant: each token has its log-prob's rounding, half a unit of 4 to 8 at most twice."""
    skipped, full = found[case]
    for mine, reference in zip(skipped["updates"], full["updates"], strict=True):
        rounding = reference["terms_count"] * 2.0**-21 / 100.0
        assert mine.pop("loss") == pytest.approx(reference.pop("loss"), rel=1e-6, abs=rounding)
        assert mine == pytest.approx(reference, rel=1e-6, abs=1e-9)
    assert skipped["measured"] == pytest.approx(full["measured"], rel=1e-6) and full["measured"]["entropy"] > 0
    for name, tensor in full["after"].items():
        torch.testing.assert_close(skipped["after"][name], tensor, rtol=1e-6, atol=1e-6)
    if case != "the sampler's":
        first = skipped["updates"][0]
        assert first["ratio_sum"] == first["terms_count"] and first["ratio_max"] == 1.0  # R = 1, exactly
    if "correction" in case:
        assert full["measured"]["truncated_weights"] > 0
        assert full["updates"][0]["grad_norm"] != pytest.approx(found["none"][1]["updates"][0]["grad_norm"], rel=1e-3)


def test_one_pass_over_ranks_equals_the_plain_way(found):
    """Loss, entropy and gradients in float64 to 1e-12; the last rank's rows end in padding."""
    got = found["one pass"]
    h, w = got["hidden"].requires_grad_(), got["weight"].requires_grad_()
    table = (h @ w[:37].T / 0.7).log_softmax(-1)
    loss = (table.gather(1, got["targets"][:, None])[:, 0].exp() * torch.arange(23)).sum()
    d_hidden, d_weight = torch.autograd.grad(loss, (h, w))
    expected = {"loss": loss, "entropy": -(table.exp() * table).sum(), "d_hidden": d_hidden, "d_weight": d_weight}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")

"""NFT against an independent float64 reference, the check values of the paper's equations, and the authors' own numbers."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from megatron_nft.config import ObjectiveConfig
from megatron_nft.objectives import METRICS, Inputs, likelihood, nft, prompt_weight, summarize

CASES = json.loads((Path(__file__).parents[1] / "data" / "nft_loss_cases.json").read_text())


def make_inputs(logprobs, old, verdicts, rates, mask=None, weight=None, scale=None) -> Inputs:
    """Inputs from [answers, tokens] tensors and per-answer lists."""
    answers, tokens = logprobs.shape

    def spread(values):
        return torch.as_tensor(values, dtype=logprobs.dtype).reshape(-1, 1).expand(answers, tokens).flatten()

    ones = torch.ones(answers)
    mask = torch.ones(answers, tokens) if mask is None else mask
    return Inputs(
        logprobs.flatten(),
        old.flatten(),
        spread(verdicts),
        spread(rates),
        spread(ones if weight is None else weight),
        spread(ones if scale is None else scale),
        mask.flatten().to(logprobs.dtype),
        torch.arange(answers).repeat_interleave(tokens),
    )


def reference_token_loss(logp, old, verdict, rate, weight, eps, neg_weight):
    """Eq. 10 for one token in plain Python floats: value and dL/dlogp."""
    rate = min(max(rate, 0.02), 0.98)
    log_ratio = logp - old
    inside = log_ratio <= 10.0
    log_ratio = min(log_ratio, 10.0)
    ratio = math.exp(log_ratio)
    x = (1 - rate * ratio) / (1 - rate)
    clipped = max(x, eps)
    loss = -weight * (verdict * log_ratio + neg_weight * (1 - verdict) * math.log(clipped))
    d_positive = verdict
    d_negative = neg_weight * (1 - verdict) * (-rate * ratio / (1 - rate)) / clipped
    return loss, -weight * (d_positive + d_negative) * inside


@pytest.mark.parametrize("eps", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("neg_weight", [0.0, 0.5, 1.0])
def test_value_and_gradient_equal_a_plain_float64_reference(eps, neg_weight):
    rng = random.Random(1)
    rows = []
    for _ in range(200):
        old = -rng.random() * 5
        rows.append((old + rng.gauss(0, 2), old, rng.choice([0.0, 1.0, 0.3]), rng.random(), rng.random()))
    rows += [(20.0, 0.0, 1.0, 0.5, 1.0), (20.0, 0.0, 0.0, 0.5, 1.0), (-1.0, 0.0, 0.0, 0.0, 1.0), (-1.0, 0.0, 1.0, 1.0, 1.0)]
    logp, old, verdict, rate, weight = (torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*rows))
    logp.requires_grad_()
    loss, _ = nft(make_inputs(logp, old, verdict, rate, weight=weight), ObjectiveConfig(eps=eps, neg_weight=neg_weight))
    loss.backward()
    expected = [reference_token_loss(*row, eps, neg_weight) for row in rows]
    assert loss.item() == pytest.approx(sum(value for value, _ in expected), rel=1e-12)
    torch.testing.assert_close(logp.grad[:, 0], torch.tensor([g for _, g in expected], dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "verdict, ratio, gradient",
    [(1, 0.5, -0.75), (1, 1, -0.75), (1, 3, -0.75), (0, 0.5, 0.10714), (0, 1, 0.25), (0, 1.5, 0.375), (0, 3, 0.75)],
)
def test_check_values(verdict, ratio, gradient):
    """r̂ = 0.25, normalize 1, eps 1."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    inputs = make_inputs(logp, torch.zeros(1, 1), [verdict], [0.25], weight=[prompt_weight(0.25, 1)])
    loss, _ = nft(inputs, ObjectiveConfig())
    loss.backward()
    assert logp.grad.item() == pytest.approx(gradient, abs=5e-6)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['ratio']}-norm{c['normalize']}-neg{c['neg_weight']}-eps{c['eps']}-{c['correct_rate']}"
)
def test_authors_own_numbers(case):
    """108 cases of the authors' published code: token form sum / 1000, sequence form plain sum. Their clamp rounds at 1e-11."""
    logp = torch.tensor(case["logprobs"], dtype=torch.float64, requires_grad=True)
    answers = len(case["right"])
    constant = 1000.0 if case["ratio"] == "token" else 1.0
    inputs = make_inputs(
        logp,
        torch.tensor(case["old_logprobs"], dtype=torch.float64),
        case["right"],
        [case["correct_rate"]] * answers,
        mask=torch.tensor(case["mask"]),
        weight=[prompt_weight(case["correct_rate"], case["normalize"])] * answers,
        scale=[1 / constant] * answers,
    )
    settings = ObjectiveConfig(eps=case["eps"], neg_weight=case["neg_weight"], ratio=case["ratio"])
    loss, _ = nft(inputs, settings)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(logp.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("normalize", [1, 2])
@pytest.mark.parametrize("right", range(1, 8))
def test_on_policy_gradient_is_dr_grpo_or_grpo(normalize, right):
    """Prop. 4.2: at R = 1 the gradient is that of A = r - mean (normalize 1) and A = (r - mean) / std (normalize 2)."""
    k = 8
    verdicts = torch.tensor([1.0] * right + [0.0] * (k - right), dtype=torch.float64)
    rate = right / k
    logp = torch.randn(k, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = [prompt_weight(rate, normalize)] * k
    loss, _ = nft(make_inputs(logp, logp.detach(), verdicts, [rate] * k, weight=weight), ObjectiveConfig())
    loss.backward()
    advantage = verdicts - rate
    if normalize == 2:
        advantage = advantage / verdicts.std(correction=0)
    torch.testing.assert_close(logp.grad, -advantage[:, None].expand(-1, 5), rtol=1e-12, atol=1e-12)


def test_neg_weight_zero_is_rft():
    """Wrong answers have no gradient; right ones are imitated with weight w."""
    logp = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    nft(make_inputs(logp, torch.zeros(2, 3), [1, 0], [0.5, 0.5]), ObjectiveConfig(neg_weight=0.0))[0].backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0] * 3, [0.0] * 3], dtype=torch.float64))


def test_value_and_gradient_do_not_depend_on_packing():
    """The same answers in one micro-batch and in two, in another order, with padding between."""
    generator = torch.Generator().manual_seed(3)
    logp = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    old = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    verdicts, rates = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.25, 0.25])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5, [0] * 6])
    for ratio in ("token", "sequence"):
        settings = ObjectiveConfig(ratio=ratio)
        whole = nft(make_inputs(logp, old, verdicts, rates, mask=mask), settings)[0]
        (grad_whole,) = torch.autograd.grad(whole, logp)
        pieces = sum(
            nft(make_inputs(logp[part], old[part], verdicts[part], rates[part], mask=mask[part]), settings)[0] for part in ([2, 0], [3, 1])
        )
        (grad_pieces,) = torch.autograd.grad(pieces, logp)
        torch.testing.assert_close(whole, pieces, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(grad_whole, grad_pieces, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("log_ratio", [-69.0, -10.0, 0.0, 9.9, 69.0])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_finite_in_float32_for_extreme_ratios(log_ratio, rate, verdict):
    logp = torch.full((1, 1), log_ratio, requires_grad=True)
    loss, metrics = nft(make_inputs(logp, torch.zeros(1, 1), [verdict], [rate]), ObjectiveConfig(eps=0.1))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())


def test_empty_micro_batch_is_zero():
    inputs = make_inputs(torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 4), [0.0], [0.0], mask=torch.zeros(1, 4))
    for ratio in ("token", "sequence"):
        loss, metrics = nft(inputs, ObjectiveConfig(ratio=ratio))
        assert loss.item() == 0.0 and all(value.item() == 0.0 for value in metrics.values())


def test_metrics_say_which_tokens_are_clipped_and_how_hard_the_update_pushes():
    """r̂ = 0.25, w = 0.75: wrong tokens at R = 0.5, 1.5 and 3 (two of three clipped), one right token."""
    logp = torch.tensor([[0.0], [math.log(0.5)], [math.log(1.5)], [math.log(3)]], dtype=torch.float64)
    weight = [prompt_weight(0.25, 1)] * 4
    loss, metrics = nft(make_inputs(logp, torch.zeros(4, 1), [1, 0, 0, 0], [0.25] * 4, weight=weight), ObjectiveConfig())
    assert set(metrics) == set(METRICS)
    update = {"loss": loss.item(), "grad_norm": 2.0, "lr": 1e-3, **{name: value.item() for name, value in metrics.items()}}
    summary = summarize([update], clip_grad=1.0)
    assert summary["clip_share_wrong"] == pytest.approx(2 / 3)
    assert summary["positive_coefficient"] == pytest.approx(0.75)
    assert summary["negative_coefficient"] == pytest.approx(-(0.10714285714 + 0.375 + 0.75) / 3)
    assert summary["ratio_mean"] == pytest.approx(1.5) and summary["ratio_max"] == pytest.approx(3)
    assert summary["clipped_updates"] == 1.0


def test_prompt_weight():
    assert prompt_weight(0.25, 0) == 1.0
    assert prompt_weight(0.25, 1) == 0.75
    assert prompt_weight(0.2, 2) == pytest.approx(2.0)
    assert prompt_weight(0.0, 1) == pytest.approx(0.98)  # r̂ is clamped to [0.02, 0.98]


def test_likelihood_is_the_mean_negative_log_likelihood():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    loss, metrics = likelihood(make_inputs(logp, torch.zeros(2, 2), [1, 1], [1, 1], mask=mask, scale=[1 / 3, 1 / 3]))
    loss.backward()
    assert loss.item() == pytest.approx(2.0) and metrics["nll_sum"].item() == 6.0
    torch.testing.assert_close(logp.grad, -mask / 3)

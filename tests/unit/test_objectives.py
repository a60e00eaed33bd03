"""Every objective against an independent reference in plain Python, each other, and the authors' own numbers; all in float64."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from megatron_nft.config import CorrectionConfig, ObjectiveConfig
from megatron_nft.objectives import (
    METRICS,
    MISMATCH,
    OBJECTIVES,
    Inputs,
    advantages,
    correction,
    likelihood,
    loss,
    prompt_weight,
    summarize,
    summarize_mismatch,
    weights,
)

CASES = json.loads((Path(__file__).parents[1] / "data" / "nft_loss_cases.json").read_text())
RATIOS = ("token", "sequence", "geometric")


def make_inputs(logprobs, old, verdicts, rates, mask=None, weight=None, scale=None, factor=None) -> Inputs:
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
        spread(ones if factor is None else factor),
        mask.flatten().to(logprobs.dtype),
        torch.arange(answers).repeat_interleave(tokens),
    )


def group_inputs(logprobs, old, verdicts, config: ObjectiveConfig, penalties=None, **kwargs) -> Inputs:
    """One group: r̂ and weights as the program computes them."""
    verdicts = np.asarray(verdicts, dtype=np.float64)
    weight = weights(verdicts, np.zeros(len(verdicts)) if penalties is None else np.asarray(penalties), config)
    return make_inputs(logprobs, old, verdicts, [verdicts.mean()] * len(verdicts), weight=weight, **kwargs)


def gradient(inputs: Inputs, logprobs: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    value, _ = loss(inputs, config)
    return torch.autograd.grad(value, logprobs)[0]


def random_answers(answers: int, tokens: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs with gradient, old log-probs, mask of uneven lengths, one answer empty), float64 [answers, tokens]."""
    g = torch.Generator().manual_seed(seed)
    old = -5 * torch.rand(answers, tokens, dtype=torch.float64, generator=g)
    logprobs = old + spread * torch.randn(answers, tokens, dtype=torch.float64, generator=g)
    lengths = torch.randint(1, tokens + 1, (answers,), generator=g)
    lengths[-1], lengths[0] = 0, 1
    return logprobs.requires_grad_(), old, (torch.arange(tokens) < lengths[:, None]).double()


# ---- closed forms, written from the papers in plain Python


def nft_coefficient(ratio: float, verdict: float, rate: float, weight: float, config: ObjectiveConfig) -> float:
    rate = min(max(rate, 0.02), 0.98)
    implicit = (1 - rate * ratio) / (1 - rate)
    return weight * (verdict - config.neg_weight * (1 - verdict) * (rate * ratio / (1 - rate)) / max(implicit, config.eps))


def ppo_coefficient(ratio: float, verdict: float, rate: float, advantage: float, config: ObjectiveConfig) -> float:
    if advantage > 0:
        return advantage * ratio if ratio <= 1 + config.clip_ratio_high else 0.0
    return advantage * ratio if ratio >= 1 - config.clip_ratio_low else 0.0


def cispo_coefficient(ratio: float, verdict: float, rate: float, advantage: float, config: ObjectiveConfig) -> float:
    return advantage * min(max(ratio, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)


def topr_coefficient(ratio: float, verdict: float, rate: float, advantage: float, config: ObjectiveConfig) -> float:
    return advantage * (min(ratio, 1.0) if advantage < 0 else 1.0)


CLOSED_FORMS = {
    "nft": nft_coefficient, "rft": nft_coefficient, "grpo": ppo_coefficient, "dr_grpo": ppo_coefficient, "dapo": ppo_coefficient,
    "gspo": ppo_coefficient, "cispo": cispo_coefficient, "topr": topr_coefficient,
}  # fmt: skip


def answer_ratios(logprobs, old, mask, ratio: str) -> list[list[float]]:
    """R of every token, in plain Python."""
    rows = []
    for logp, old_logp, counted in zip(logprobs.tolist(), old.tolist(), mask.tolist()):
        differences = [(a - b) * m for a, b, m in zip(logp, old_logp, counted)]
        tokens = max(sum(counted), 1.0)
        whole = {"sequence": sum(differences), "geometric": sum(differences) / tokens}
        rows.append([math.exp(min(whole.get(ratio, d), 10.0)) for d in differences])
    return rows


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_equals_the_closed_form(name, ratio):
    """dL/dlogp = -scale correction c for every counted token (through the geometric mean, 1/T of it), 1e-12 relative."""
    config = ObjectiveConfig(name=name, ratio=ratio)
    verdicts = [1, 0, 0, 1, 0.25, 0]  # a partly right answer, too
    logprobs, old, mask = random_answers(6, 7, seed=2, spread=0.3)
    factor, scale = [1, 0.5, 2, 1, 0, 1], [1, 2, 3, 4, 5, 6]
    inputs = group_inputs(logprobs, old, verdicts, config, mask=mask, factor=factor, scale=scale)
    got = gradient(inputs, logprobs, config)
    ratios = answer_ratios(logprobs, old, mask, ratio)
    weight = weights(np.array(verdicts, dtype=float), np.zeros(6), config)
    for i, verdict in enumerate(verdicts):
        per_token = max(mask[i].sum().item(), 1.0) if ratio == "geometric" else 1.0
        for t in range(7):
            c = CLOSED_FORMS[name](ratios[i][t], verdict, sum(verdicts) / 6, weight[i], config)
            expected = -scale[i] * factor[i] * c * mask[i, t].item() / per_token
            assert got[i, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15), (i, t)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_stands_at_masked_tokens_counts_nowhere(name, ratio):
    """No bit of loss, gradient, metrics and correction hangs on it, were it not a number."""
    config = ObjectiveConfig(name=name, ratio=ratio, correction=CorrectionConfig("truncate", "sequence"))
    logprobs, old, mask = random_answers(6, 7, seed=4, spread=0.3)
    found = []
    for filler in (0.0, float("nan")):
        inputs = group_inputs(logprobs, old.where(mask > 0, torch.tensor(filler)), [1, 0, 0, 1, 0, 1], config, mask=mask)
        value, metrics = loss(inputs, config)
        factor, sums = correction(logprobs.detach().flatten(), inputs.old_logprobs, inputs.mask, inputs.answer_index, config)
        found.append([*torch.autograd.grad(value, logprobs), value, factor, *metrics.values(), *sums.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_equals_finite_differences(name):
    """Of the value itself, away from the clips' corners (cispo and topr: of the surrogate with its ratio held)."""
    config = ObjectiveConfig(name=name, ratio="token")
    logprobs, old, mask = random_answers(4, 3, seed=5, spread=0.05 if name in ("grpo", "dr_grpo", "dapo") else 0.00005)
    verdicts = [1, 0, 0, 1]
    got = gradient(group_inputs(logprobs, old, verdicts, config, mask=mask), logprobs, config)
    step = 1e-6
    for i, t in mask.nonzero().tolist():
        shifted = [logprobs.detach().clone() for _ in range(2)]
        shifted[0][i, t] += step
        shifted[1][i, t] -= step
        up, down = (loss(group_inputs(x, old, verdicts, config, mask=mask), config)[0].item() for x in shifted)
        if name in ("nft", "rft") and verdicts[i] == 0:
            continue  # the value is cut at eps = 1 where R > 1, its gradient is kept: see the closed form
        rtol = 1e-6 if name not in ("cispo", "topr") else 1e-3
        assert got[i, t].item() == pytest.approx((up - down) / (2 * step), rel=rtol, abs=1e-9)


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
    value, _ = loss(make_inputs(logp, old, verdict, rate, weight=weight), ObjectiveConfig(eps=eps, neg_weight=neg_weight))
    value.backward()
    expected = [reference_token_loss(*row, eps, neg_weight) for row in rows]
    assert value.item() == pytest.approx(sum(value for value, _ in expected), rel=1e-12)
    torch.testing.assert_close(logp.grad[:, 0], torch.tensor([g for _, g in expected], dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "verdict, ratio, gradient",
    [(1, 0.5, -0.75), (1, 1, -0.75), (1, 3, -0.75), (0, 0.5, 0.10714), (0, 1, 0.25), (0, 1.5, 0.375), (0, 3, 0.75)],
)
def test_check_values(verdict, ratio, gradient):
    """r̂ = 0.25, normalize 1, eps 1."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    inputs = make_inputs(logp, torch.zeros(1, 1), [verdict], [0.25], weight=[prompt_weight(0.25, 1)])
    value, _ = loss(inputs, ObjectiveConfig())
    value.backward()
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
    value, _ = loss(inputs, ObjectiveConfig(eps=case["eps"], neg_weight=case["neg_weight"], ratio=case["ratio"]))
    value.backward()
    assert value.item() == pytest.approx(case["loss"], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(logp.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-9, atol=1e-13)


# ---- equivalences (Prop. 4.1, 4.2)


@pytest.mark.parametrize("normalize, other", [(1, "dr_grpo"), (2, "grpo")])
@pytest.mark.parametrize("right", range(1, 8))
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_on_policy_nft_is_dr_grpo_or_grpo(normalize, other, right, eps):
    """At R = 1 the gradients of the two objectives are equal, to 1e-12: with the same reduction, for every r̂ and eps <= 1."""
    verdicts = [1.0] * right + [0.0] * (8 - right)
    logprobs = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mine = ObjectiveConfig("nft", normalize=normalize, eps=eps)
    theirs = ObjectiveConfig(other)
    a = gradient(group_inputs(logprobs, logprobs.detach(), verdicts, mine), logprobs, mine)
    b = gradient(group_inputs(logprobs, logprobs.detach(), verdicts, theirs), logprobs, theirs)
    assert a.abs().min() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_off_policy_they_differ_in_the_clip_alone():
    """Right answer: NFT pushes at any R, GRPO nothing above its band. Wrong answer: NFT decays with R, GRPO is 0 below its band."""
    verdicts, nft, grpo = [1.0, 0.0], ObjectiveConfig("nft", normalize=2), ObjectiveConfig("grpo")
    for ratio, kept in ((0.5, (True, False)), (3.0, (False, True))):
        logprobs = torch.full((2, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
        old = torch.zeros(2, 1, dtype=torch.float64)
        assert (gradient(group_inputs(logprobs, old, verdicts, nft), logprobs, nft) != 0).all()
        got = gradient(group_inputs(logprobs, old, verdicts, grpo), logprobs, grpo)
        assert tuple((got != 0).flatten().tolist()) == kept


def test_neg_weight_zero_is_rft():
    """Wrong answers have no gradient; right ones are imitated with weight w."""
    logprobs, old, mask = random_answers(4, 3, seed=1)
    rft, masked = ObjectiveConfig("rft"), ObjectiveConfig("nft", neg_weight=0.0, normalize=0)
    verdicts = [1, 0, 1, 0]
    got = gradient(group_inputs(logprobs, old, verdicts, rft, mask=mask), logprobs, rft)
    torch.testing.assert_close(got, -torch.tensor(verdicts)[:, None] * mask, rtol=1e-15, atol=0)
    torch.testing.assert_close(gradient(group_inputs(logprobs, old, verdicts, masked, mask=mask), logprobs, masked), got, rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.25, 0.5])
def test_equal_soft_verdicts_teach_nothing(level):
    """The continuous case: on-policy, answers that are all equally right have no gradient under NFT, and no advantage elsewhere."""
    logprobs = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    for name in ("nft", "grpo", "dr_grpo", "dapo"):
        config = ObjectiveConfig(name)
        got = gradient(group_inputs(logprobs, logprobs.detach(), [level] * 4, config), logprobs, config)
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-15)


# ---- weights


def test_prompt_weight():
    assert prompt_weight(0.25, 0) == 1.0
    assert prompt_weight(0.25, 1) == 0.75
    assert prompt_weight(0.2, 2) == pytest.approx(2.0)
    assert prompt_weight(0.2, "maxrl") == pytest.approx(4.0)
    assert prompt_weight(0.0, 1) == pytest.approx(0.98)  # r̂ is clamped to [0.02, 0.98]


def test_advantages_have_the_population_deviation():
    rewards = np.array([1.0, 0, 0, 0])
    np.testing.assert_allclose(advantages(rewards, 1), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(advantages(rewards, 2), np.array([0.75, -0.25, -0.25, -0.25]) / math.sqrt(3 / 16), rtol=1e-15)
    assert (advantages(np.full(4, 0.3), 2) == 0).all()


def test_nft_learns_from_mixed_groups_alone():
    """Without dynamic sampling all-wrong and all-right groups come along: NFT drops them, whatever w(q) would be at the clamps."""
    for normalize in (0, 1, 2, "maxrl"):
        config = ObjectiveConfig("nft", normalize=normalize)
        for verdicts in ([0.0] * 4, [1.0] * 4, [0.5] * 4):
            assert (weights(np.array(verdicts), np.zeros(4), config) == 0).all()
        assert (weights(np.array([1.0, 0, 0, 0]), np.zeros(4), config) > 0).all()
    assert (weights(np.ones(1), np.zeros(1), ObjectiveConfig("rft")) == 1).all()  # one right answer is enough for RFT


def test_the_signed_reward_gives_the_penalty_its_share():
    """DAPO: scores -1 and 1 plus penalty; with 0 and 1 the same penalty would weigh twice as much after division by std."""
    verdicts, penalties = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.0, -1.0, 0.0, -1.0])
    rewards = np.array([1.0, 0.0, -1.0, -2.0])
    np.testing.assert_allclose(weights(verdicts, penalties, ObjectiveConfig("dapo")), (rewards + 0.5) / rewards.std())
    unsigned = weights(verdicts, penalties, ObjectiveConfig("dapo", signed_reward=False))
    np.testing.assert_allclose(unsigned, np.array([1.0, 0.0, 0.0, -1.0]) / math.sqrt(0.5))
    binary = ObjectiveConfig("grpo"), ObjectiveConfig("grpo", signed_reward=True)
    np.testing.assert_allclose(*(weights(verdicts, np.zeros(4), config) for config in binary))  # without penalty they are the same


# ---- packing, extremes


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_value_and_gradient_do_not_depend_on_packing(name, ratio):
    """The same answers in one micro-batch and in two, in another order, with padding between."""
    config = ObjectiveConfig(name=name, ratio=ratio)
    logprobs, old, mask = random_answers(4, 6, seed=3)
    verdicts, rates = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.25, 0.25])
    weight = torch.tensor([0.5, 0.5, 0.75, 0.75] if name in ("nft", "rft") else [1.0, -1.0, -0.5, 1.5])

    def part(rows: list[int]) -> torch.Tensor:
        return loss(make_inputs(logprobs[rows], old[rows], verdicts[rows], rates[rows], mask=mask[rows], weight=weight[rows]), config)[0]

    whole, pieces = part([0, 1, 2, 3]), part([2, 0]) + part([3, 1])
    torch.testing.assert_close(whole, pieces, rtol=1e-14, atol=1e-14)
    grads = (torch.autograd.grad(value, logprobs)[0] for value in (whole, pieces))
    torch.testing.assert_close(*grads, rtol=1e-14, atol=1e-14)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=strategies.sampled_from(sorted(OBJECTIVES)),
    ratio=strategies.sampled_from(RATIOS),
    exponents=strategies.lists(strategies.floats(-30, 30), min_size=1, max_size=4),  # R = 10^x of each token
    verdict=strategies.floats(0, 1),
    rate=strategies.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    weight=strategies.floats(-8, 8),
    eps=strategies.sampled_from([1e-3, 0.1, 1.0, 2.0]),
    empty=strategies.booleans(),
)
def test_finite_in_float32_for_every_ratio(name, ratio, exponents, verdict, rate, weight, eps, empty):
    """R from 1e-30 to 1e30, r̂ at its clamps, single-token and empty answers: loss, gradient and metrics are finite, c their gradient."""
    config = ObjectiveConfig(name=name, ratio=ratio, **({"eps": eps} if name == "nft" else {}))
    logprobs = torch.tensor([exponents, exponents], dtype=torch.float32).mul(math.log(10)).requires_grad_()
    mask = torch.stack([torch.ones(len(exponents)), torch.full((len(exponents),), 0.0 if empty else 1.0)])
    inputs = make_inputs(logprobs, torch.zeros_like(logprobs), [verdict] * 2, [rate] * 2, mask=mask, weight=[weight] * 2)
    value, metrics = loss(inputs, config)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(number) for number in metrics.values())
    if empty:
        assert (logprobs.grad[1] == 0).all()
    total = metrics["right_coefficient"] + metrics["wrong_coefficient"]  # every term's c, each once
    per_answer = {"token": 1.0, "geometric": 1.0, "sequence": len(exponents)}[ratio]
    assert -logprobs.grad.sum().item() / per_answer == pytest.approx(total.item(), rel=1e-3, abs=1e-3 * (1 + abs(weight)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=strategies.integers(0, 10**6), name=strategies.sampled_from(sorted(OBJECTIVES)), ratio=strategies.sampled_from(RATIOS))
def test_order_and_padding_change_nothing(seed, name, ratio):
    """Tokens of padding anywhere behind the answers, and answers in another order: value and gradient stay."""
    config = ObjectiveConfig(name=name, ratio=ratio)
    logprobs, old, mask = random_answers(5, 4, seed)
    verdicts = [1, 0, 0, 1, 0]
    weight = weights(np.array(verdicts, dtype=float), np.zeros(5), config)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist()
    plain = loss(make_inputs(logprobs, old, verdicts, [0.4] * 5, mask=mask, weight=weight), config)[0]
    padding = torch.full((5, 3), 7.0, dtype=torch.float64)
    wide = [torch.cat([x, padding], 1)[order] for x in (logprobs, old)]
    moved = make_inputs(*wide, [verdicts[i] for i in order], [0.4] * 5, mask=torch.cat([mask, 0 * padding], 1)[order], weight=weight[order])
    value = loss(moved, config)[0]
    torch.testing.assert_close(value, plain, rtol=1e-13, atol=1e-13)
    a, b = (torch.autograd.grad(x, logprobs)[0] for x in (plain, value))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_empty_micro_batch_is_zero(name, ratio):
    inputs = make_inputs(torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 4), [0.0], [0.0], mask=torch.zeros(1, 4))
    value, metrics = loss(inputs, ObjectiveConfig(name=name, ratio=ratio))
    assert value.item() == 0.0 and all(number.item() == 0.0 for number in metrics.values())


# ---- the sampler's mismatch


def mismatch(method: str, level: str, **bounds) -> tuple[torch.Tensor, dict[str, float]]:
    """Two answers of two tokens and padding: w = 4, 0.25 (product 1) and 2, 2 (product 4)."""
    old = torch.tensor([4.0, 0.25, 2.0, 2.0, 9.0], dtype=torch.float64).log()
    mask, index = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2])
    chosen = ObjectiveConfig(correction=CorrectionConfig(method, level, **bounds))
    factor, sums = correction(old, torch.zeros_like(old), mask, index, chosen)
    assert set(sums) == set(MISMATCH)
    return factor, summarize_mismatch({name: value.item() for name, value in sums.items()})


@pytest.mark.parametrize(
    "method, level, bounds, factor, cut",
    [
        ("none", "token", {}, [1, 1, 1, 1], 0), ("none", "sequence", {}, [1, 1, 1, 1], 0),
        ("truncate", "token", {"cap": 3.0}, [3, 0.25, 2, 2], 1 / 4), ("truncate", "sequence", {"cap": 3.0}, [1, 1, 3, 3], 1 / 2),
        ("truncate", "geometric", {"cap": 1.5}, [1, 1, 1.5, 1.5], 1 / 2),
        ("mask", "token", {"cap": 3.0, "floor": 0.5}, [0, 0, 2, 2], 1 / 2),
        ("mask", "sequence", {"cap": 3.0, "floor": 0.5}, [1, 1, 0, 0], 1 / 2),
        ("mask", "geometric", {"cap": 3.0, "floor": 1.5}, [0, 0, 2, 2], 1 / 2),
    ],
)  # fmt: skip
def test_correction(method, level, bounds, factor, cut):
    """The factors, 1 on padding, and the share that was cut or masked of the tokens or answers."""
    got, summary = mismatch(method, level, **bounds)
    torch.testing.assert_close(got, torch.tensor([*factor, 1.0], dtype=torch.float64), rtol=1e-14, atol=0)
    assert summary["truncated_weights"] == pytest.approx(cut)


def test_mismatch_metrics():
    """Mean |log w|, the k3 estimate w - 1 - log w, and (sum w)^2 / (n sum w^2), of w = 4, 0.25, 2, 2 or 1, 4."""
    w = np.array([4, 0.25, 2, 2])
    _, summary = mismatch("none", "token")
    assert summary["logprob_difference"] == pytest.approx(np.abs(np.log(w)).mean())
    assert summary["mismatch_k3"] == pytest.approx((w - 1 - np.log(w)).mean())
    assert summary["effective_sample_size"] == pytest.approx(w.sum() ** 2 / (4 * (w**2).sum()))
    assert mismatch("none", "sequence")[1]["effective_sample_size"] == pytest.approx(25 / (2 * 17))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_the_correction(name):
    """Each token's part of loss and gradient is multiplied by its factor; denominators stay."""
    config = ObjectiveConfig(name=name, ratio="token")
    logprobs, old, mask = random_answers(4, 3, seed=8)
    plain = gradient(group_inputs(logprobs, old, [1, 0, 0, 1], config, mask=mask), logprobs, config)
    factor = [0.0, 0.5, 1.0, 2.0]
    got = gradient(group_inputs(logprobs, old, [1, 0, 0, 1], config, mask=mask, factor=factor), logprobs, config)
    torch.testing.assert_close(got, plain * torch.tensor(factor, dtype=torch.float64)[:, None], rtol=1e-14, atol=0)


@pytest.mark.parametrize("level", RATIOS)
def test_a_perfect_sampler_needs_no_correction(level):
    old = torch.log_softmax(torch.randn(6, generator=torch.Generator().manual_seed(1)), 0)
    mask, index = torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])
    for method in ("none", "truncate", "mask"):
        factor, sums = correction(old, old.clone(), mask, index, ObjectiveConfig(correction=CorrectionConfig(method, level)))
        summary = summarize_mismatch({name: value.item() for name, value in sums.items()})
        assert (factor == 1).all()
        assert summary == {"logprob_difference": 0, "mismatch_k3": 0, "effective_sample_size": 1, "truncated_weights": 0}


# ---- metrics


def summary_of(logprobs, verdicts, weight, config: ObjectiveConfig, rate: float) -> dict[str, float]:
    inputs = make_inputs(logprobs, torch.zeros_like(logprobs), verdicts, [rate] * len(verdicts), weight=weight)
    value, metrics = loss(inputs, config)
    assert set(metrics) == set(METRICS)
    update = {"loss": value.item(), "lr": 1e-3, **{name: number.item() for name, number in metrics.items()}}
    return summarize([update | {"grad_norm": 2.0}, update | {"grad_norm": 0.5}], clip_grad=1.0)


def test_metrics_say_which_tokens_are_clipped_and_how_hard_the_update_pushes():
    """r̂ = 0.25, w = 0.75: wrong tokens at R = 0.5, 1.5 and 3 (two of three clipped), one right token."""
    logprobs = torch.tensor([[0.0], [math.log(0.5)], [math.log(1.5)], [math.log(3)]], dtype=torch.float64)
    summary = summary_of(logprobs, [1, 0, 0, 0], [prompt_weight(0.25, 1)] * 4, ObjectiveConfig(), 0.25)
    pushes = (0.10714285714, 0.375, 0.75)
    assert summary["clip_share_wrong"] == pytest.approx(2 / 3) and summary["clip_share_right"] == 0
    assert summary["positive_coefficient"] == pytest.approx(0.75)
    assert summary["negative_coefficient"] == pytest.approx(-sum(pushes) / 3)
    assert summary["coefficient"] == pytest.approx((0.75 - sum(pushes)) / 4)
    assert summary["ratio_mean"] == pytest.approx(1.5) and summary["ratio_max"] == pytest.approx(3)
    assert summary["clipped_updates"] == 0.5


def test_metrics_of_a_clipped_surrogate():
    """DAPO's band [0.8, 1.28]: a right token is clipped above it, a wrong one below."""
    logprobs = torch.tensor([1.0, 1.25, 1.3, 0.7, 0.9, 1.3], dtype=torch.float64).log()[:, None]
    summary = summary_of(logprobs, [1, 1, 1, 0, 0, 0], [2.0, 2.0, 2.0, -1.0, -1.0, -1.0], ObjectiveConfig("dapo"), 0.5)
    assert summary["clip_share_right"] == pytest.approx(1 / 3) and summary["clip_share_wrong"] == pytest.approx(1 / 3)
    assert summary["positive_coefficient"] == pytest.approx(2 * 2.25 / 3)
    assert summary["negative_coefficient"] == pytest.approx(-2.2 / 3)


def test_what_no_clip_cuts_is_not_counted_as_clipped():
    """RFT has no negative term to clip; cispo none where A = 0; beyond log R = 10 the gradient is 0 under every objective."""
    above = torch.ones(2, 1, dtype=torch.float64)
    assert summary_of(above, [1, 0], [1.0, 1.0], ObjectiveConfig("rft"), 0.5)["clip_share_wrong"] == 0
    assert summary_of(3 * above, [1, 0], [0.0, 0.0], ObjectiveConfig("cispo"), 0.5)["clip_share_right"] == 0
    for name in OBJECTIVES:
        beyond = summary_of(11 * above, [1, 0], [1.0, -1.0], ObjectiveConfig(name, ratio="token"), 0.5)
        assert beyond["clip_share_right"] == beyond["clip_share_wrong"] == 1 and beyond["coefficient"] == 0


def test_likelihood_is_the_mean_negative_log_likelihood():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    value, metrics = likelihood(make_inputs(logp, torch.zeros(2, 2), [1, 1], [1, 1], mask=mask, scale=[1 / 3, 1 / 3]))
    value.backward()
    assert value.item() == pytest.approx(2.0) and metrics["nll_sum"].item() == 6.0
    torch.testing.assert_close(logp.grad, -mask / 3)

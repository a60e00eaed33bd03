"""The objectives: NFT and RFT, GRPO, Dr.GRPO, DAPO, GSPO, CISPO and TOPR, as pure functions of tensors.

All of them are one sum over terms (tokens, or whole answers where `ratio` is sequence or geometric):

    L = - sum scale · correction · mask · value(log R)

with R = pi_theta / pi_old. An objective is the function `value` of a term and its derivative in log R, the coefficient c: an update
pushes log pi_theta up by c. Autograd follows `value`; c is the closed form, for the metrics, and what the tests hold the gradient to.

NFT (arXiv 2505.18116) splits the behaviour policy by Bayes into r_q pi+ + (1 - r_q) pi- = pi_old. The policy in training is pi+;
wrong answers train the same parameters through the implicit negative policy pi- = (pi_old - r_q pi+) / (1 - r_q).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_nft.config import POLICY_GRADIENT, ObjectiveConfig

RATE_BOUNDS = (0.02, 0.98)  # r̂ is clamped to these
LOG_RATIO_MAX = 10.0  # log R is cut here, without gradient beyond: R = 22,026 is a fault of the numbers, not a signal


@dataclass
class Inputs:
    """What an objective sees of a packed micro-batch. All tensors are [tokens]; where `mask` is 0 nothing counts."""

    logprobs: torch.Tensor  # log pi_theta of the sampled token, with gradient
    old_logprobs: torch.Tensor  # log pi_old
    verdict: torch.Tensor  # r of the token's answer, in [0, 1]
    correct_rate: torch.Tensor  # r̂ of the token's group
    weight: torch.Tensor  # of the token's answer, from `weights`: prompt weight w(q), or advantage A
    scale: torch.Tensor  # 1 / denominator of the reduction, over the whole mini-batch
    correction: torch.Tensor  # from `correction`: for a sampler that is not exactly the trainer; 1 where there is none
    mask: torch.Tensor  # 1 or 0
    answer_index: torch.Tensor  # int64: which answer of the micro-batch the token belongs to


@dataclass
class Terms:
    """An objective at its terms. All tensors are [terms]."""

    value: torch.Tensor  # what the update raises, with gradient
    coefficient: torch.Tensor  # c = d value / d log R, without gradient
    clipped: torch.Tensor  # bool: where a clip cuts the value


# ---- answers: what a group's verdicts make each of its answers worth


def clamp_rate(correct_rate):
    """r̂ within [0.02, 0.98], so that no denominator vanishes. Numbers and tensors."""
    low, high = RATE_BOUNDS
    return correct_rate.clamp(low, high) if torch.is_tensor(correct_rate) else min(max(correct_rate, low), high)


def prompt_weight(correct_rate: float, normalize: int | str) -> float:
    """w(q) of NFT. normalize 0: 1. 1: 1 - r̂ (on-policy gradient = Dr.GRPO's). 2: sqrt((1 - r̂) / r̂) (= GRPO's). Prop. 4.2.
    maxrl: (1 - r̂) / r̂ (arXiv 2602.02710)."""
    rate = clamp_rate(correct_rate)
    return {0: 1.0, 1: 1.0 - rate, 2: math.sqrt((1.0 - rate) / rate), "maxrl": (1.0 - rate) / rate}[normalize]


def advantages(rewards: np.ndarray, normalize: int) -> np.ndarray:
    """A of a group's answers. normalize 1: reward - mean (Dr.GRPO). 2: (reward - mean) / population std (GRPO). [answers]

    Equal rewards have no advantage.
    """
    if np.ptp(rewards) == 0.0:
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / rewards.std() if normalize == 2 else centred


def weights(verdicts: np.ndarray, penalties: np.ndarray, settings: ObjectiveConfig) -> np.ndarray:
    """`Inputs.weight` of each answer of one group, from the verdicts in [0, 1] and the penalties (<= 0) of all of them. [answers]

    NFT and RFT: the prompt weight w(q), the same for all; for NFT 0 where all verdicts are equal, for it learns from mixed groups alone.
    The others: the advantage A of the reward, which is verdict + penalty or,
    with `signed_reward`, 2 verdict - 1 + penalty.
    """
    if settings.name == "nft" and np.ptp(verdicts) == 0.0:
        return np.zeros(len(verdicts))
    if settings.name not in POLICY_GRADIENT:
        return np.full(len(verdicts), prompt_weight(verdicts.mean(), settings.normalize))
    scores = 2.0 * verdicts - 1.0 if settings.signed_reward else verdicts
    return advantages(scores + penalties, settings.normalize)


# ---- objectives: functions of (terms of the inputs, log R, settings)


def max_v(x: torch.Tensor, eps: float) -> torch.Tensor:
    """stop_gradient(max(x, eps) - x) + x: the value clipped from below, the gradient of x kept (below Eq. 10).

    Written as a function of its own: (max(x, eps) - x) + x would lose digits.
    """
    return _StraightThroughMax.apply(x, eps)


class _StraightThroughMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        return x.clamp(min=eps)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def nft(inputs: Inputs, log_ratio: torch.Tensor, settings: ObjectiveConfig) -> Terms:
    """NFT, arXiv 2505.18116, Eq. 10 and Algorithm 1; RFT with neg_weight 0.

        value = w(q) [ r log R + neg_weight (1 - r) log max_v((1 - r̂ R) / (1 - r̂), eps) ]
        c     = w(q) [ r - neg_weight (1 - r) (r̂ R / (1 - r̂)) / max((1 - r̂ R) / (1 - r̂), eps) ]

    for verdicts r anywhere in [0, 1] (the paper's continuous case); a right answer has neither ratio nor clip.
    """
    rate, ratio = clamp_rate(inputs.correct_rate), log_ratio.exp()
    implicit = (1.0 - rate * ratio) / (1.0 - rate)  # pi-/pi_old
    clipped = max_v(implicit, settings.eps)
    wrong = settings.neg_weight * (1.0 - inputs.verdict)
    value = inputs.weight * (inputs.verdict * log_ratio + wrong * clipped.log())
    coefficient = inputs.weight * (inputs.verdict - wrong * (rate * ratio / (1.0 - rate)) / clipped)
    return Terms(value, coefficient.detach(), (implicit < settings.eps) & (wrong > 0))


def clipped_surrogate(inputs: Inputs, log_ratio: torch.Tensor, settings: ObjectiveConfig) -> Terms:
    """PPO's clipped objective with a group's advantage A: GRPO (arXiv 2402.03300, Eq. 3, without KL), Dr.GRPO (arXiv 2503.20783),
    DAPO (arXiv 2503.14476, Eq. 8: another bound above than below) and, with the geometric ratio, GSPO (arXiv 2507.18071, Eq. 5).

        value = min(R A, clip(R, 1 - clip_ratio_low, 1 + clip_ratio_high) A)
        c     = R A, and 0 where R has left the band in the direction of A
    """
    low, high, ratio = 1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high, log_ratio.exp()
    value = torch.minimum(ratio * inputs.weight, ratio.clamp(low, high) * inputs.weight)
    clipped = ((inputs.weight > 0) & (ratio > high)) | ((inputs.weight < 0) & (ratio < low))
    return Terms(value, (ratio * inputs.weight * ~clipped).detach(), clipped)


def cispo(inputs: Inputs, log_ratio: torch.Tensor, settings: ObjectiveConfig) -> Terms:
    """CISPO, arXiv 2506.13585, Eq. 4 and 5: the ratio is cut, no token's gradient is. log R stands for log pi_theta: same gradient.

    value = stop_gradient(clip(R, 1 - clip_ratio_low, 1 + clip_ratio_high)) A log R,   c = clip(R, ...) A
    """
    ratio = log_ratio.detach().exp()
    cut = ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    return Terms(cut * inputs.weight * log_ratio, cut * inputs.weight, (cut != ratio) & (inputs.weight != 0))


def topr(inputs: Inputs, log_ratio: torch.Tensor, settings: ObjectiveConfig) -> Terms:
    """After TOPR, arXiv 2503.14286: REINFORCE, the ratio of answers with A < 0 cut to [0, 1], that of the others left out.

    value = stop_gradient(R if A < 0 and R < 1 else 1) A log R
    """
    ratio = log_ratio.detach().exp()
    taper = torch.where(inputs.weight < 0, ratio.clamp(max=1.0), torch.ones_like(ratio))
    return Terms(taper * inputs.weight * log_ratio, taper * inputs.weight, (inputs.weight < 0) & (ratio > 1.0))


OBJECTIVES: dict[str, Callable[[Inputs, torch.Tensor, ObjectiveConfig], Terms]] = {
    "nft": nft,
    "rft": nft,
    "grpo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "gspo": clipped_surrogate,
    "cispo": cispo,
    "topr": topr,
}


def loss(inputs: Inputs, settings: ObjectiveConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, summed, every term already divided by the whole mini-batch's denominator; and its metrics.

    settings.ratio: token, R_t = exp(logprobs - old_logprobs); sequence, one R per answer, the product over its tokens; geometric, its
    geometric mean over them. The metrics (METRICS) are sums over the terms, to be added up over micro-batches and ranks.
    """
    log_ratio, terms = _counting(inputs.logprobs - inputs.old_logprobs, inputs.mask), inputs
    if settings.ratio != "token":
        log_ratio, terms = _by_answer(log_ratio, inputs, settings.ratio)
    inside = log_ratio <= LOG_RATIO_MAX
    log_ratio = log_ratio.clamp(max=LOG_RATIO_MAX)
    made = OBJECTIVES[settings.name](terms, log_ratio, settings)
    total = -(terms.scale * terms.correction * terms.mask * made.value).sum()
    acting = replace(made, coefficient=made.coefficient * terms.correction * inside, clipped=made.clipped | ~inside)
    return total, _metrics(terms, log_ratio.detach().exp(), acting)


def _counting(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """0 where the mask is, whatever stands there: a tool's tokens have no log-prob of the sampler. [tokens]"""
    return torch.where(mask > 0, values, torch.zeros_like(values))


def likelihood(inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The supervised loss, - sum_t scale log pi_theta: mean negative log-likelihood with scale = 1 / loss tokens."""
    terms = inputs.mask * inputs.logprobs
    return -(inputs.scale * terms).sum(), {"terms_count": inputs.mask.sum(), "nll_sum": -terms.detach().sum()}


def sum_by_answer(values: torch.Tensor, answer_index: torch.Tensor, answers: int) -> torch.Tensor:
    """Sums over the tokens of each answer, padding apart. values [tokens] -> [answers]"""
    return values.new_zeros(answers).index_add(0, answer_index, values)


def _by_answer(log_ratio: torch.Tensor, inputs: Inputs, ratio: str) -> tuple[torch.Tensor, Inputs]:
    """One log-ratio per answer; the other fields, constant within an answer, become one number each. [answers]"""
    answers = int(inputs.answer_index.max()) + 1
    summed = sum_by_answer(log_ratio, inputs.answer_index, answers)
    if ratio == "geometric":
        summed = summed / sum_by_answer(inputs.mask, inputs.answer_index, answers).clamp(min=1.0)

    def one(values: torch.Tensor) -> torch.Tensor:
        counted, zeros = values * inputs.mask, summed.detach().new_zeros(answers)
        # of either sign, and exactly: one of the two is 0
        return zeros.scatter_reduce(0, inputs.answer_index, counted, "amax") + zeros.scatter_reduce(0, inputs.answer_index, counted, "amin")

    fields = (inputs.verdict, inputs.correct_rate, inputs.weight, inputs.scale, inputs.correction, inputs.mask)
    return summed, Inputs(summed, torch.zeros_like(summed), *map(one, fields), torch.arange(answers, device=summed.device))


# ---- the sampler's mismatch


def correction(
    old: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, answer_index: torch.Tensor, settings: ObjectiveConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The factor of each token's loss for a sampler whose log-probs differ from pi_old's, and the sums that tell by how much.

    w = pi_old / pi_sampler of a token or, by settings.correction.level, of its answer (sequence: the product over the answer's
    tokens; geometric: its geometric mean). none: 1. truncate: min(w, cap), truncated importance sampling (Ionides 2008).
    mask: w where floor <= w <= cap, 0 elsewhere. All tensors [tokens]; the factor has no gradient and is 1 where `mask` is 0. The
    denominators of the loss stay as they are.
    """
    log_w, counted, spread = _counting((old - sampler).detach(), mask), mask, lambda x: x
    if settings.correction.level != "token":
        answers = int(answer_index.max()) + 1
        tokens = sum_by_answer(mask, answer_index, answers)
        counted = (tokens > 0).to(mask.dtype)
        total = sum_by_answer(log_w, answer_index, answers)
        unit, spread = total / tokens.clamp(min=1.0) if settings.correction.level == "geometric" else total, lambda x: x[answer_index]
    else:
        unit = log_w
    w = unit.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    factor = _bounded(w, settings)
    sums = _mismatch(log_w, mask) | {
        "units_count": counted.sum(),
        "units_weight": (w * counted).sum(),
        "units_weight_squared": (w * w * counted).sum(),
        "units_truncated": ((factor != w) * counted).sum() if settings.correction.method != "none" else torch.zeros_like(w.sum()),
    }
    return torch.where(mask > 0, spread(factor), torch.ones_like(mask)), sums


def _bounded(w: torch.Tensor, settings: ObjectiveConfig) -> torch.Tensor:
    chosen = settings.correction
    if chosen.method == "truncate":
        return w.clamp(max=chosen.cap)
    if chosen.method == "mask":
        return torch.where((w >= chosen.floor) & (w <= chosen.cap), w, torch.zeros_like(w))
    return torch.ones_like(w)


def _mismatch(log_w: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over tokens of |log w| and of w - 1 - log w, whose mean over the sampler's tokens estimates KL(sampler, pi_old) ("k3")."""
    k3 = log_w.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    return {"mismatch_count": mask.sum(), "mismatch_absolute": log_w.abs().sum(), "mismatch_k3": ((torch.expm1(k3) - k3) * mask).sum()}


MISMATCH = ["mismatch_count", "mismatch_absolute", "mismatch_k3", "units_count", "units_weight", "units_weight_squared", "units_truncated"]
MEASURED = [*MISMATCH, "entropy"]


def measure(
    old: torch.Tensor,
    entropies: torch.Tensor,
    sampler: torch.Tensor,
    mask: torch.Tensor,
    answer_index: torch.Tensor,
    settings: ObjectiveConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The factors of `correction` and the sums MEASURED: its own, and of the entropies, in nats. All tensors [tokens]."""
    factor, sums = correction(old, sampler, mask, answer_index, settings)
    return factor, sums | {"entropy": (entropies * mask).sum()}


def summarize_measured(totals: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a rollout step from the totals MEASURED of its passes: mean entropy of a token, in nats, and `summarize_mismatch`."""
    total = {name: sum(t[name] for t in totals) for name in MEASURED}
    return {"entropy": total["entropy"] / max(total["mismatch_count"], 1.0), **summarize_mismatch(total)}


def summarize_mismatch(total: dict[str, float]) -> dict[str, float]:
    """Metrics of a rollout step from the totals of `correction`.

    logprob_difference: mean |log pi_old - log pi_sampler| of a token, in nats. mismatch_k3: KL(sampler, pi_old) per token, in nats.
    effective_sample_size: (sum w)^2 / (n sum w^2) of the tokens or answers that w is of, 1 where all weigh the same.
    truncated_weights: share of them whose w the correction cut or masked.
    """
    tokens, units = max(total["mismatch_count"], 1e-9), max(total["units_count"], 1e-9)
    return {
        "logprob_difference": total["mismatch_absolute"] / tokens,
        "mismatch_k3": total["mismatch_k3"] / tokens,
        "effective_sample_size": min(total["units_weight"] ** 2 / max(units * total["units_weight_squared"], 1e-9), 1.0),
        "truncated_weights": total["units_truncated"] / units,
    }


# ---- metrics

METRICS = ["terms_count", "right_count", "wrong_count", "ratio_sum", "ratio_max", "right_clipped", "wrong_clipped",
           "right_coefficient", "wrong_coefficient"]  # fmt: skip


@torch.no_grad()
def _metrics(terms: Inputs, ratio: torch.Tensor, made: Terms) -> dict[str, torch.Tensor]:
    """Sums over terms (`ratio_max`: the maximum); `*_count` are what to divide them by. An answer of verdict r is right by r of it."""
    right, wrong = terms.mask * terms.verdict, terms.mask * (1.0 - terms.verdict)
    return {
        "terms_count": terms.mask.sum(),
        "right_count": right.sum(),
        "wrong_count": wrong.sum(),
        "ratio_sum": (ratio * terms.mask).sum(),
        "ratio_max": (ratio * terms.mask).max(),
        "right_clipped": (right * made.clipped).sum(),
        "wrong_clipped": (wrong * made.clipped).sum(),
        "right_coefficient": (right * made.coefficient).sum(),
        "wrong_coefficient": (wrong * made.coefficient).sum(),
    }


def summarize(updates: list[dict[str, float]], clip_grad: float) -> dict[str, float]:
    """Metrics of a rollout step from the totals of its updates: means over the terms (tokens, or answers for one R per answer).

    clipped_updates: share of the updates whose gradient norm was above clip_grad. clip_share_*: share of the terms of right or wrong
    answers that the objective's clip cut. *coefficient: mean c (the correction included) of all terms, of right and of wrong ones.
    skipped_updates: how many had no step because their fp16 gradients overflowed (they have no gradient norm).
    """
    if not updates:
        return {}
    total = {name: sum(u[name] for u in updates) for name in METRICS}
    terms, right, wrong = (max(total[name], 1e-9) for name in ("terms_count", "right_count", "wrong_count"))
    norms = [u["grad_norm"] for u in updates if "grad_norm" in u]
    scale = {"loss_scale": updates[-1]["loss_scale"]} if "loss_scale" in updates[-1] else {}
    return {
        "loss": sum(u["loss"] for u in updates) / len(updates),
        **({"grad_norm": sum(norms) / len(norms)} if norms else {}),
        **scale,
        "skipped_updates": len(updates) - len(norms),
        "clipped_updates": sum(norm > clip_grad > 0 for norm in norms) / len(updates),
        "lr": updates[-1]["lr"],
        "updates": len(updates),
        "ratio_mean": total["ratio_sum"] / terms,
        "ratio_max": max(u["ratio_max"] for u in updates),
        "clip_share_right": total["right_clipped"] / right,
        "clip_share_wrong": total["wrong_clipped"] / wrong,
        "coefficient": (total["right_coefficient"] + total["wrong_coefficient"]) / terms,
        "positive_coefficient": total["right_coefficient"] / right,
        "negative_coefficient": total["wrong_coefficient"] / wrong,
    }

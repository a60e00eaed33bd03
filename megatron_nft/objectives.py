"""NFT, arXiv 2505.18116: pure functions of tensors. Equation numbers are the paper's.

The behaviour policy is split by Bayes into r_q pi+ + (1 - r_q) pi- = pi_old. The trained policy is pi+; wrong answers train
the same parameters through the implicit negative policy pi- = (pi_old - r_q pi+) / (1 - r_q).
"""

import math
from dataclasses import dataclass

import torch

from megatron_nft.config import ObjectiveConfig

RATE_BOUNDS = (0.02, 0.98)  # r̂ is clamped to these
LOG_RATIO_MAX = 10.0


@dataclass
class Inputs:
    """What an objective sees of a packed micro-batch. All tensors are [tokens]; where `mask` is 0 nothing counts."""

    logprobs: torch.Tensor  # log pi_theta of the sampled token, with gradient
    old_logprobs: torch.Tensor  # log pi_old
    verdict: torch.Tensor  # r of the token's answer, in [0, 1]
    correct_rate: torch.Tensor  # r̂ of the token's group
    weight: torch.Tensor  # prompt weight w(q)
    scale: torch.Tensor  # 1 / denominator of the reduction, over the whole mini-batch
    mask: torch.Tensor  # 1 or 0
    answer_index: torch.Tensor  # int64: which answer of the micro-batch the token belongs to


def clamp_rate(correct_rate):
    """r̂ within [0.02, 0.98], so that no denominator vanishes. Numbers and tensors."""
    low, high = RATE_BOUNDS
    return correct_rate.clamp(low, high) if torch.is_tensor(correct_rate) else min(max(correct_rate, low), high)


def prompt_weight(correct_rate: float, normalize: int) -> float:
    """w(q). normalize 0: 1. 1: 1 - r̂ (on-policy gradient = Dr.GRPO's). 2: sqrt((1 - r̂) / r̂) (= GRPO's). Prop. 4.2."""
    rate = clamp_rate(correct_rate)
    return {0: 1.0, 1: 1.0 - rate, 2: math.sqrt((1.0 - rate) / rate)}[normalize]


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


def nft(inputs: Inputs, settings: ObjectiveConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """NFT, Eq. 10 and Algorithm 1:

        L = - sum_q w(q) sum_a sum_t [ r log R_t + neg_weight (1 - r) log max_v((1 - r̂ R_t) / (1 - r̂), eps) ]

    with R_t = exp(logprobs - old_logprobs), or for `ratio: sequence` one R per answer, the exponential of the summed log-ratio,
    and one term per answer in place of the sum over t. neg_weight 0 is RFT. Log-ratios are cut at 10, without gradient beyond.

    Returns (loss, metrics): the loss summed over the micro-batch, every term already divided by the whole mini-batch's
    denominator (`scale`); the metrics are sums over its terms, to be added up over micro-batches and ranks.
    """
    log_ratio = (inputs.logprobs - inputs.old_logprobs) * inputs.mask
    terms = inputs
    if settings.ratio == "sequence":
        log_ratio, terms = _per_answer(log_ratio, inputs)
    log_ratio = log_ratio.clamp(max=LOG_RATIO_MAX)
    rate = clamp_rate(terms.correct_rate)
    ratio = log_ratio.exp()
    implicit = (1.0 - rate * ratio) / (1.0 - rate)  # pi-/pi_old
    clipped = max_v(implicit, settings.eps)
    positive = terms.verdict * log_ratio
    negative = settings.neg_weight * (1.0 - terms.verdict) * clipped.log()
    loss = -(terms.weight * terms.scale * terms.mask * (positive + negative)).sum()
    return loss, _metrics(terms, settings, ratio, rate, implicit, clipped)


OBJECTIVES = {"nft": nft}
METRICS = ["terms_count", "right_count", "wrong_count", "ratio_sum", "ratio_max", "wrong_clipped", "right_coefficient", "wrong_coefficient"]


def summarize(updates: list[dict[str, float]], clip_grad: float) -> dict[str, float]:
    """Metrics of a rollout step from the totals of its updates: means over the terms (tokens, or answers for `ratio: sequence`)."""
    if not updates:
        return {}
    total = {name: sum(u[name] for u in updates) for name in METRICS}
    terms, right, wrong = (max(total[name], 1e-9) for name in ("terms_count", "right_count", "wrong_count"))
    norms = [u["grad_norm"] for u in updates]
    return {
        "loss": sum(u["loss"] for u in updates) / len(updates),
        "grad_norm": sum(norms) / len(norms),
        "clipped_updates": sum(norm > clip_grad > 0 for norm in norms) / len(norms),
        "lr": updates[-1]["lr"],
        "updates": len(updates),
        "ratio_mean": total["ratio_sum"] / terms,
        "ratio_max": max(u["ratio_max"] for u in updates),
        "clip_share_wrong": total["wrong_clipped"] / wrong,
        "positive_coefficient": total["right_coefficient"] / right,
        "negative_coefficient": total["wrong_coefficient"] / wrong,
    }


def _per_answer(log_ratio: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, Inputs]:
    """Sum the log-ratio over each answer; the other fields, constant within an answer, become one number each. [answers]"""
    answers = int(inputs.answer_index.max()) + 1
    zeros = torch.zeros(answers, dtype=log_ratio.dtype, device=log_ratio.device)
    summed = zeros.index_add(0, inputs.answer_index, log_ratio)

    def one(values: torch.Tensor) -> torch.Tensor:
        return zeros.scatter_reduce(0, inputs.answer_index, values * inputs.mask, "amax")

    per_answer = (one(x) for x in (inputs.verdict, inputs.correct_rate, inputs.weight, inputs.scale, inputs.mask))
    return summed, Inputs(summed, torch.zeros_like(summed), *per_answer, torch.arange(answers, device=summed.device))


@torch.no_grad()
def _metrics(terms: Inputs, settings: ObjectiveConfig, ratio, rate, implicit, clipped) -> dict[str, torch.Tensor]:
    """Sums over terms (`ratio_max`: the maximum); `*_count` are what to divide them by.

    The update pushes log pi_theta of a token up by its coefficient c: w(q) for a right answer, and for a wrong one
    -neg_weight w(q) (r̂ R / (1 - r̂)) / max((1 - r̂ R) / (1 - r̂), eps).
    """
    right = terms.mask * terms.verdict
    wrong = terms.mask * (1.0 - terms.verdict)
    c_wrong = -settings.neg_weight * (rate * ratio / (1.0 - rate)) / clipped
    return {
        "terms_count": terms.mask.sum(),
        "right_count": right.sum(),
        "wrong_count": wrong.sum(),
        "ratio_sum": (ratio * terms.mask).sum(),
        "ratio_max": (ratio * terms.mask).max(),
        "wrong_clipped": (wrong * (implicit < settings.eps)).sum(),
        "right_coefficient": (right * terms.weight).sum(),
        "wrong_coefficient": (wrong * terms.weight * c_wrong).sum(),
    }


def likelihood(inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The supervised loss, - sum_t scale log pi_theta: mean negative log-likelihood with scale = 1 / loss tokens."""
    terms = inputs.mask * inputs.logprobs
    return -(inputs.scale * terms).sum(), {"terms_count": inputs.mask.sum(), "nll_sum": -terms.detach().sum()}

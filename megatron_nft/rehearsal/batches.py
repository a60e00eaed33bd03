"""What the trainer makes of a rollout step's groups, with the real packing and the real denominators, for all data-parallel ranks."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_nft import batching, objectives
from megatron_nft.batching import Answers, Layout, MiniBatch, Plan, TrainingAnswer
from megatron_nft.config import Config
from megatron_nft.trajectories import Group


@dataclass(frozen=True)
class Batched:
    """A rollout step as mini-batches of all replicas."""

    plan: Plan
    answers: Answers
    counts: list[int]  # micro-batches a replica, of each mini-batch
    slots: list[int]  # of each of them
    fill: float  # share of all slots that hold a token
    balance: float  # the slowest replica's work by the mean, of the worst mini-batch
    bubble: float  # share of an update in which a pipeline stage waits, from the counts, on average
    same: bool  # whether ranks that heard the engines' answers in another order plan the same
    denominators: float  # largest relative difference, over mini-batches, of the replicas' sum of 1 / denominator and the plain one


def batch(config: Config, groups: list[Group], layout: Layout, stages: int, chunks: int) -> Batched:
    """Plan all mini-batches of the groups, and pack one for every replica. stages, chunks: of the pipeline, and those of a stage."""
    answers = table(groups)
    plan = _plan(config, answers, layout)
    again = _plan(config, table(sorted(groups[::-1], key=lambda group: group.position)), layout)
    minis = plan.mini_batches
    slots = sum(len(replica) * mini.slots for mini in minis for replica in mini.micro_batches)
    tokens = sum(int(answers.lengths[mini.answers].sum()) for mini in minis)
    return Batched(
        plan, answers, [len(mini.micro_batches[0]) for mini in minis], [mini.slots for mini in minis],
        fill=tokens / slots if slots else 0.0,
        balance=max((_balance(mini, answers.lengths, layout) for mini in minis), default=1.0),
        bubble=float(np.mean([(stages - 1) / (chunks * len(mini.micro_batches[0]) + stages - 1) for mini in minis])) if minis else 0.0,
        same=np.array_equal(plan.scales, again.scales) and minis == again.mini_batches,
        denominators=max((_difference(config, answers, plan, mini) for mini in minis[:1]), default=0.0),
    )  # fmt: skip


def table(groups: list[Group]) -> Answers:
    """As policy/exchange.py gathers it from all ranks."""
    ordered = sorted(groups, key=lambda group: group.position)
    rows = [(len(g.prompt.token_ids), len(r.token_ids), sum(r.mask()), r.verdict.score, r.penalty) for g in ordered for r in g.responses]
    values = np.array(rows, np.float64).reshape(-1, 5)
    sizes = [len(group.responses) for group in ordered]
    of_group = np.repeat(np.arange(len(sizes)), sizes)
    return Answers(*values[:, :3].astype(np.int64).T, values[:, 3], values[:, 4], of_group)


def _plan(config: Config, answers: Answers, layout: Layout) -> Plan:
    settings = config.objective
    weights = partial(objectives.weights, settings=settings)
    return batching.plan(answers, layout, weights, settings.reduction, settings.reduction_constant, settings.ratio != "token")


def _balance(mini: MiniBatch, lengths: np.ndarray, layout: Layout) -> float:
    """A replica's work: its slots, and attention's square of its answers."""
    squares = [sum(float((lengths[batch].astype(float) ** 2).sum()) for batch in replica) for replica in mini.micro_batches]
    works = [len(replica) * mini.slots + layout.attention_cost * square for replica, square in zip(mini.micro_batches, squares)]
    return max(works) / (sum(works) / len(works))


def _difference(config: Config, answers: Answers, plan: Plan, mini: MiniBatch) -> float:
    """Pack the mini-batch on every replica, and sum 1 / denominator over the tokens that are trained on; relative to the plain sum."""
    held = {number: _answer(answers, number) for number in mini.answers}
    packed = [batching.pack(members, held, plan, mini.slots, plan.layout.sequence_multiple)
              for replica in mini.micro_batches for members in replica]  # fmt: skip
    summed = sum(float((batch.scale.double() * batch.loss_mask).sum()) for batch in packed)
    return abs(summed - (plain := plain_sum(config, answers.loss_tokens[mini.answers]))) / (plain or 1.0)


def plain_sum(config: Config, loss_tokens: np.ndarray) -> float:
    """Sum of 1 / denominator over a mini-batch's tokens, from the definition of the reduction."""
    settings, trained = config.objective, loss_tokens[loss_tokens > 0]
    if settings.reduction == "constant":
        return trained.sum() / settings.reduction_constant
    if settings.ratio != "token":  # an answer is one term, put on each of its tokens
        return trained.sum() / len(trained)
    return 1.0 if len(trained) else 0.0


def _answer(answers: Answers, number: int) -> TrainingAnswer:
    prompt, response = int(answers.prompt_lengths[number]), int(answers.response_lengths[number])
    mask = [1] * response if answers.loss_tokens[number] else [0] * response
    return TrainingAnswer([0] * prompt, [0] * response, [0.0] * response, mask, float(answers.verdicts[number]))

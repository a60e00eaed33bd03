"""Groups -> balanced, packed micro-batches, and every denominator. Pure functions of lengths and verdicts, the same on every rank."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_nft.errors import UserError
from megatron_nft.trajectories import Batch


@dataclass(frozen=True)
class Answers:
    """The answers of a rollout step as all ranks know them, group after group. All arrays are [answers]."""

    prompt_lengths: np.ndarray  # int
    response_lengths: np.ndarray  # int
    loss_tokens: np.ndarray  # int: sum of the loss mask
    verdicts: np.ndarray  # float
    penalties: np.ndarray  # float, <= 0
    groups: np.ndarray  # int: number of the answer's group, 0, 0, ..., 1, 1, ...

    @property
    def lengths(self) -> np.ndarray:
        """Prompt and response, in tokens."""
        return self.prompt_lengths + self.response_lengths

    @property
    def of_groups(self) -> list[np.ndarray]:
        """The answer numbers of each group."""
        return np.split(np.arange(len(self.groups)), np.flatnonzero(np.diff(self.groups)) + 1) if len(self.groups) else []


@dataclass(frozen=True)
class Layout:
    """How a mini-batch is laid out."""

    data_parallel_size: int
    tokens_per_micro_batch: int
    prompts_per_update: int
    sequence_multiple: int = 1  # slots of each answer in a micro-batch are a multiple of this
    micro_batch_multiple: int = 1  # micro-batches of a mini-batch are a multiple of this

    def slots(self, length: int) -> int:
        """Slots that an answer with its prompt takes."""
        return _round_up(length, self.sequence_multiple)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class MiniBatch:
    """One optimiser update: which answers, on which replica, in which micro-batch, with which scale."""

    micro_batches: list[list[list[int]]]  # [replica][micro-batch] -> answer numbers; equally many micro-batches on every replica
    fill: float  # share of the slots that hold a token

    @property
    def answers(self) -> list[int]:
        """All answers of the mini-batch."""
        return sorted(a for replica in self.micro_batches for batch in replica for a in batch)


@dataclass(frozen=True)
class Plan:
    """Every mini-batch of a rollout step, and per answer: r̂, its weight in the objective, and 1 / denominator."""

    mini_batches: list[MiniBatch]
    correct_rates: np.ndarray  # float [answers]
    weights: np.ndarray  # float [answers]
    scales: np.ndarray  # float [answers]

    def replica_of(self) -> dict[int, int]:
        """Which data-parallel replica trains each answer."""
        return {a: d for mini in self.mini_batches for d, batches in enumerate(mini.micro_batches) for b in batches for a in b}


def plan(
    answers: Answers,
    layout: Layout,
    weights: Callable[[np.ndarray, np.ndarray], np.ndarray],
    reduction: str,
    constant: float,
    per_sequence: bool = False,
) -> Plan:
    """Place the answers of a rollout step. Mini-batches keep groups together and in order.

    weights: (verdicts, penalties) of a group's answers -> their weights. reduction: `constant` (sum / constant), `token-mean` (sum /
    loss tokens of the mini-batch), `sequence-mean` (mean over answers of the mean over their tokens; an answer of which no token is
    trained on does not count). per_sequence: an answer is one term (one ratio per answer). All denominators are over the whole
    mini-batch, so they do not depend on the layout.
    Raises UserError if an answer is longer than the token budget.
    """
    if layout.slots(answers.lengths.max(initial=0)) > layout.tokens_per_micro_batch:
        longest, budget = answers.lengths.max(), layout.tokens_per_micro_batch
        raise UserError(
            f"an answer with its prompt is {longest} tokens long, train.tokens_per_micro_batch is {budget}",
            "raise train.tokens_per_micro_batch, or lower rollout.max_tokens or data.max_prompt_length",
        )
    rates, weight, scales = (np.zeros(len(answers.groups)) for _ in range(3))
    groups, mini_batches = answers.of_groups, []
    for own in groups:
        rates[own] = answers.verdicts[own].mean()
        weight[own] = weights(answers.verdicts[own], answers.penalties[own])
    for start in range(0, len(groups), layout.prompts_per_update):
        numbers = np.concatenate(groups[start : start + layout.prompts_per_update])
        scales[numbers] = 1.0 / _denominators(answers.loss_tokens[numbers], reduction, constant, per_sequence)
        mini_batches.append(place(numbers, answers.lengths, layout))
    return Plan(mini_batches, rates, weight, scales)


def _denominators(loss_tokens: np.ndarray, reduction: str, constant: float, per_sequence: bool) -> np.ndarray | float:
    if reduction == "constant":
        return constant
    if reduction == "token-mean" and not per_sequence:
        return max(loss_tokens.sum(), 1)
    trained = max((loss_tokens > 0).sum(), 1)
    return trained * (1.0 if per_sequence else np.maximum(loss_tokens, 1))


def place(numbers: np.ndarray, lengths: np.ndarray, layout: Layout) -> MiniBatch:
    """Balance answers over replicas by tokens, then pack each replica's into micro-batches, longest first (best fit)."""
    order = sorted(numbers.tolist(), key=lambda a: (-lengths[a], a))
    loads = [0] * layout.data_parallel_size
    replicas: list[list[int]] = [[] for _ in loads]
    for a in order:
        lightest = loads.index(min(loads))
        replicas[lightest].append(a)
        loads[lightest] += int(lengths[a])
    slots = {a: layout.slots(int(lengths[a])) for a in order}
    packed = [_pack(replica, slots, layout.tokens_per_micro_batch) for replica in replicas]
    most = _round_up(max(map(len, packed)), layout.micro_batch_multiple)
    for batches in packed:
        batches += [[] for _ in range(most - len(batches))]  # an empty micro-batch keeps every rank in step
    room = most * layout.tokens_per_micro_batch * layout.data_parallel_size
    return MiniBatch(packed, fill=sum(loads) / room if room else 0.0)


def _pack(order: list[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    batches, room = [], []
    for a in order:
        fitting = [i for i, free in enumerate(room) if free >= lengths[a]]
        if fitting:
            best = min(fitting, key=room.__getitem__)
        else:
            best = len(batches)
            batches.append([])
            room.append(budget)
        batches[best].append(a)
        room[best] -= lengths[a]
    return batches


@dataclass
class TrainingAnswer:
    """One answer as the rank that trains it holds it."""

    prompt: list[int]  # token ids
    response: list[int]
    logprobs: list[float]  # the sampler's, [response]
    loss_mask: list[int]  # [response]
    verdict: float


def pack(members: list[int], answers: dict[int, TrainingAnswer], plan: Plan, tokens: int, sequence_multiple: int = 1) -> Batch:
    """Lay answers end to end into one micro-batch of exactly `tokens` slots; the tail is padding (one sequence of its own).

    Each answer is padded to a multiple of sequence_multiple slots, which belong to its sequence and count as padding.

    Position t predicts token t + 1: the response's first token is predicted by the prompt's last, and the last token of an
    answer predicts nothing.
    """
    fields = {name: np.zeros(tokens, np.int64) for name in ("tokens", "targets", "positions")}
    floats = {name: np.zeros(tokens, np.float32) for name in _FLOATS}
    index = np.full(tokens, len(members), np.int64)
    starts, at = [0], 0
    for i, number in enumerate(members):
        a = answers[number]
        ids = a.prompt + a.response
        end, first = at + len(ids), at + len(a.prompt) - 1
        fields["tokens"][at:end] = ids
        fields["targets"][at : end - 1] = ids[1:]
        fields["positions"][at:end] = range(len(ids))
        predicted = slice(first, end - 1)
        floats["loss_mask"][predicted] = a.loss_mask
        floats["sampler_logprobs"][predicted] = a.logprobs
        index[at:end] = i
        floats["verdict"][predicted] = a.verdict
        floats["correct_rate"][predicted] = plan.correct_rates[number]
        floats["weight"][predicted] = plan.weights[number]
        floats["scale"][predicted] = plan.scales[number]
        at += _round_up(len(ids), sequence_multiple)
        fields["positions"][end:at] = range(len(ids), len(ids) + at - end)
        starts.append(at)
    fields["positions"][at:] = range(tokens - at)
    tensors = {name: torch.from_numpy(array) for name, array in {**fields, **floats}.items()}
    return Batch(
        **tensors,
        cu_seqlens=torch.tensor([*starts, tokens], dtype=torch.int32),
        answer_index=torch.from_numpy(index),
        old_logprobs=torch.zeros(tokens),
        correction=torch.ones(tokens),
        answers=list(members),
    )


_FLOATS = ("loss_mask", "verdict", "correct_rate", "weight", "scale", "sampler_logprobs")

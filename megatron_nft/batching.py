"""Groups -> balanced, packed micro-batches, and every denominator. Pure functions of lengths and verdicts, the same on every rank."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_nft.errors import UserError
from megatron_nft.packing import distribute
from megatron_nft.trajectories import Batch

# Lengths of micro-batches are multiples of this: what kernels like, and few enough of them that the allocator finds its blocks again.
LENGTH_MULTIPLE = 128


@dataclass(frozen=True)
class Answers:
    """The answers of a rollout step as all ranks know them, group after group. All arrays are [answers]."""

    prompt_lengths: np.ndarray  # int
    response_lengths: np.ndarray  # int
    loss_tokens: np.ndarray  # int: sum of the loss mask
    verdicts: np.ndarray  # float
    penalties: np.ndarray  # float, <= 0
    groups: np.ndarray  # int: number of the answer's group, 0, 0, ..., 1, 1, ...
    positions: np.ndarray | None = None  # int: of that group in its rollout step, where the answers are of one

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

    data_parallel_size: int  # replicas; context-parallel ranks share one
    tokens_per_micro_batch: int  # the budget: slots of a micro-batch, over all context-parallel ranks
    prompts_per_update: int
    attention_cost: float = 0.0  # of a token for each token of its sequence, in what its linear layers cost (flops.py)
    length_multiple: int | None = None  # micro-batches of a mini-batch as short as they can be, in multiples of this; None: the budget
    count_multiple: int = 1  # every replica has a multiple of so many micro-batches (interleaved pipeline: its size)
    sequence_multiple: int = 1  # every answer takes up a multiple of so many slots (context parallelism: 2 x its size)

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        """int [answers]: the slots that answers of these lengths take up."""
        return -(-lengths // self.sequence_multiple) * self.sequence_multiple


@dataclass(frozen=True)
class MiniBatch:
    """One optimiser update: which answers, on which replica, in which micro-batch."""

    micro_batches: list[list[list[int]]]  # [replica][micro-batch] -> answer numbers; equally many micro-batches on every replica
    fill: float  # share of the slots that hold a token
    slots: int  # of each of the micro-batches; no more than the budget

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
    layout: Layout

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
    Raises UserError if an answer is longer than the token budget, or the budget is no multiple of layout.sequence_multiple.
    """
    _check(answers, layout)
    rates, weight, scales = (np.zeros(len(answers.groups)) for _ in range(3))
    groups, mini_batches = answers.of_groups, []
    for own in groups:
        rates[own] = answers.verdicts[own].mean()
        weight[own] = weights(answers.verdicts[own], answers.penalties[own])
    for start in range(0, len(groups), layout.prompts_per_update):
        numbers = np.concatenate(groups[start : start + layout.prompts_per_update])
        scales[numbers] = 1.0 / _denominators(answers.loss_tokens[numbers], reduction, constant, per_sequence)
        mini_batches.append(place(numbers, answers.lengths, layout))
    return Plan(mini_batches, rates, weight, scales, layout)


def _check(answers: Answers, layout: Layout) -> None:
    budget, longest = layout.tokens_per_micro_batch, answers.lengths.max(initial=0)
    if budget % layout.sequence_multiple:
        raise UserError(
            f"train.tokens_per_micro_batch ({budget}) is no multiple of {layout.sequence_multiple}, to which every answer is padded",
            "choose a multiple",
        )
    if longest > budget:
        raise UserError(
            f"an answer with its prompt is {longest} tokens long, train.tokens_per_micro_batch is {budget}",
            "raise train.tokens_per_micro_batch, or lower rollout.max_tokens or data.max_prompt_length",
        )


def _denominators(loss_tokens: np.ndarray, reduction: str, constant: float, per_sequence: bool) -> np.ndarray | float:
    if reduction == "constant":
        return constant
    if reduction == "token-mean" and not per_sequence:
        return max(loss_tokens.sum(), 1)
    trained = max((loss_tokens > 0).sum(), 1)
    return trained * (1.0 if per_sequence else np.maximum(loss_tokens, 1))


# Costs are counted in whole 1/1024 of what the linear layers cost for one slot, so that every rank adds up the same.
_UNIT = 1024
# What a token costs beyond a slot of padding, whose share of the linear layers is the same: the output layer works on tokens that count
# alone. It is 2 % (Qwen2.5 32B) to 15 % (1.5B) of the whole; enough here to keep the tokens of replicas even where nothing else tells.
_TOKEN_COST = 0.03


def place(numbers: np.ndarray, lengths: np.ndarray, layout: Layout) -> MiniBatch:
    """Pack answers into micro-batches and these into replicas, tightly and so that replicas take equally long (packing.distribute).

    numbers: the answers to place; lengths: int [all answers], none above the budget.
    """
    own = lengths[numbers]
    slots = layout.slots(own)
    costs = _UNIT * (_TOKEN_COST * own + layout.attention_cost * slots * slots)
    multiple = layout.length_multiple and math.lcm(layout.length_multiple, layout.sequence_multiple)
    replicas, budget = layout.data_parallel_size, layout.tokens_per_micro_batch
    packed = distribute(slots, np.rint(costs).astype(np.int64), replicas, budget, multiple, layout.count_multiple, _UNIT)
    named = numbers.tolist()
    micro_batches = [[[named[i] for i in batch] for batch in replica] for replica in packed.bins]
    room = sum(map(len, micro_batches)) * packed.slots
    return MiniBatch(micro_batches, fill=int(own.sum()) / room, slots=packed.slots)


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

    Position t predicts token t + 1: the response's first token is predicted by the prompt's last, and the last token of an
    answer predicts nothing. Every answer starts at a multiple of `sequence_multiple`; the slots up to the next one are trailing
    tokens of its sequence, which predict nothing: no token of the answer sees them. `tokens` is such a multiple, too.
    """
    fields = {name: np.zeros(tokens, np.int64) for name in ("tokens", "targets", "positions")}
    floats = {name: np.zeros(tokens, np.float32) for name in _FLOATS}
    index = np.full(tokens, len(members), np.int64)
    steps, starts, at = np.arange(tokens), [0], 0
    for i, number in enumerate(members):
        a = answers[number]
        ids = np.array(a.prompt + a.response, np.int64)
        end, first = at + len(ids), at + len(a.prompt) - 1
        padded = at + -(-len(ids) // sequence_multiple) * sequence_multiple
        fields["tokens"][at:end] = ids
        fields["targets"][at : end - 1] = ids[1:]
        fields["positions"][at:padded] = steps[: padded - at]
        index[at:padded] = i
        trained = np.flatnonzero(a.loss_mask)
        predicting = first + trained
        floats["loss_mask"][predicting] = 1.0
        floats["sampler_logprobs"][predicting] = np.asarray(a.logprobs, np.float32)[trained]  # of a tool's tokens there are none
        floats["verdict"][predicting] = a.verdict
        floats["correct_rate"][predicting] = plan.correct_rates[number]
        floats["weight"][predicting] = plan.weights[number]
        floats["scale"][predicting] = plan.scales[number]
        at = padded
        starts.append(at)
    fields["positions"][at:] = steps[: tokens - at]
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


def join(batches: list[Batch]) -> Batch:
    """Micro-batches end to end as one, for a forward-only pass, which has room for more tokens; `split` undoes it."""
    joined = {name: torch.cat([getattr(b, name) for b in batches]) for name in _JOINED}
    ends = np.cumsum([0, *(int(b.cu_seqlens[-1]) for b in batches)]).tolist()  # the padding of each stays a sequence of its own
    starts = [b.cu_seqlens[:-1] + at for b, at in zip(batches, ends)]
    firsts = np.cumsum([0, *(len(b.answers) + 1 for b in batches)]).tolist()  # + 1: padding has the number of answers
    index = [b.answer_index + at for b, at in zip(batches, firsts)]
    return Batch(
        **joined,
        cu_seqlens=torch.cat([*starts, starts[0].new_tensor([ends[-1]])]),
        answer_index=torch.cat(index),
        answers=[a for b in batches for a in b.answers],
    )


def split(joined: Batch, batches: list[Batch]) -> None:
    """Give old_logprobs and correction of a joined batch back to the micro-batches it is made of."""
    sizes = [len(b.tokens) for b in batches]
    for b, old, factor in zip(batches, joined.old_logprobs.split(sizes), joined.correction.split(sizes), strict=True):
        b.old_logprobs, b.correction = old, factor


_JOINED = ("tokens", "targets", "positions", *_FLOATS, "old_logprobs", "correction")

"""What flows through a step: a Prompt, its sampled Responses, the Group they form, and the packed Batch they become.

torch is named in annotations only, so that the processes which judge answers start without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sent to the sampler."""

    id: str
    question: str  # as the data set has it
    answer: str  # the gold answer
    token_ids: tuple[int, ...]  # the chat template applied, generation prompt included
    source: str  # name of the data set
    alternatives: tuple[str, ...] = ()  # further golds: an answer that is worth any of them is right
    reward: str | None = None  # name of the verdict function; None: reward.function

    @property
    def golds(self) -> tuple[str, ...]:
        """All gold answers."""
        return (self.answer, *self.alternatives)


@dataclass(frozen=True)
class Verdict:
    """What a verdict function says of one response."""

    score: float  # in [0, 1]
    outcome: str  # one of OUTCOMES
    found: str | None = None  # the answer as the function found it, normalised; equal answers mostly have equal ones


# no_answer: none found, or none that can be read; timed_out and crashed: the verdict function, not the answer, failed
OUTCOMES = ("right", "wrong", "no_answer", "timed_out", "crashed")


@dataclass
class Response:
    """One sampled answer, token ids and log-probs exactly as the sampler gave them (the end token included)."""

    token_ids: list[int]
    logprobs: list[float]  # log pi_sampler of each token, at the sampling temperature
    finish_reason: str  # "stop", "length", or "unfinished": what there is so far of an answer that will go on
    weight_version: int  # of the sampler's weights at its first token: the number of weight updates before it
    text: str
    loss_mask: list[int] | None = None  # None: every token counts
    verdict: Verdict | None = None
    penalty: float = 0.0  # <= 0, e.g. overlong; kept apart from the verdict
    later_versions: list[tuple[int, int]] | None = None  # (first token, weight version) where the weights changed within the answer

    @property
    def versions(self) -> list[int]:
        """The weight version that each token was sampled with."""
        return [version for version, count in self.version_runs for _ in range(count)]

    @property
    def version_runs(self) -> list[tuple[int, int]]:
        """(weight version, how many tokens in a row were sampled with it)."""
        starts = [(0, self.weight_version), *(self.later_versions or ()), (len(self.token_ids), 0)]
        return [(version, end - first) for (first, version), (end, _) in zip(starts, starts[1:]) if end > first]

    def followed_by(self, rest: Response, text: str) -> Response:
        """This unfinished answer with the rest of it, which a resumed request gave; text: of both."""
        mask = None if self.loss_mask is None and rest.loss_mask is None else self.mask() + rest.mask()
        begun = len(self.token_ids)
        changed = [(begun, rest.weight_version)] if rest.weight_version != self.version_runs[-1][0] else []
        changed += [(begun + first, version) for first, version in rest.later_versions or ()]
        return Response(self.token_ids + rest.token_ids, self.logprobs + rest.logprobs, rest.finish_reason, self.weight_version, text,
                        mask, later_versions=[*(self.later_versions or ()), *changed] or None)  # fmt: skip

    def mask(self) -> list[int]:
        """The per-token loss mask, all ones where none was set."""
        return [1] * len(self.token_ids) if self.loss_mask is None else self.loss_mask


@dataclass
class Group:
    """One prompt with its K responses."""

    prompt: Prompt
    responses: list[Response] = field(default_factory=list)
    position: int = 0  # of the prompt in the rollout step: the order of training, whichever engine sampled the group

    @property
    def correct_rate(self) -> float:
        """r̂, the mean verdict of the K responses."""
        return sum(response.verdict.score for response in self.responses) / len(self.responses)

    @property
    def is_mixed(self) -> bool:
        """Not all verdicts are equal (0 < r̂ < 1 where they are 0 or 1): the only groups an objective learns from."""
        return len({response.verdict.score for response in self.responses}) > 1


@dataclass(frozen=True)
class Pushes:
    """How hard its update pushed the tokens of one answer. The lists are [response tokens], None for a token that is not trained on."""

    position: int  # of the answer's group in the rollout step
    sample: int  # number of the answer in its group
    ratios: list[float | None]  # R = pi_theta / pi_old of the token, when its update was made
    coefficients: list[float | None]  # c, by which the update pushes log pi_theta of the token up


@dataclass
class Batch:
    """One packed micro-batch of one rank: answers laid end to end, padded at the tail to a fixed token count.

    Token t predicts target t; the per-token fields belong to that prediction and are zero where `loss_mask` is.
    All tensors are [tokens] unless said otherwise; floats are float32.
    """

    tokens: torch.Tensor  # int64
    targets: torch.Tensor  # int64: the next token
    positions: torch.Tensor  # int64, from 0 in every answer
    cu_seqlens: torch.Tensor  # int32 [answers + 2], on the CPU: starts of the answers, of the padding, and the end
    loss_mask: torch.Tensor  # 1 where the target is a sampled token that counts
    answer_index: torch.Tensor  # int64: number of the answer within this micro-batch; padding: the number of answers
    verdict: torch.Tensor  # r of the token's answer, in [0, 1]
    correct_rate: torch.Tensor  # r̂ of the token's group
    weight: torch.Tensor  # of the token's answer in the objective: prompt weight w(q), or advantage
    scale: torch.Tensor  # 1 / denominator of the reduction, over the whole mini-batch
    sampler_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    correction: torch.Tensor  # factor of the token's loss for a sampler that is not exactly the trainer
    answers: list[int]  # their numbers in the rollout step, in packing order

    @property
    def max_seqlen(self) -> int:
        """Length of the longest answer (or of the padding) in tokens."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

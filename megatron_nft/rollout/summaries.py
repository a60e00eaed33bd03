"""What is told of groups, and the statistics of a rollout step."""

from collections import Counter
from dataclasses import dataclass

from megatron_nft.trajectories import OUTCOMES, Group, Response


@dataclass(frozen=True)
class GroupSummary:
    """What the other engines learn of a group."""

    position: int  # of the prompt among all that were sent
    rates: tuple[float, ...]  # the verdicts of its answers, dropped ones left out; may be empty
    lengths: tuple[int, ...]  # of these answers, in tokens
    sampled: int  # answers, dropped ones included
    truncated: int  # answers that ended by length, dropped ones included
    outcomes: Counter  # of all sampled answers
    staleness: tuple[int, int]  # updates between a token's weights and those of the step: sum over the tokens, and the largest

    @property
    def correct_rate(self) -> float:
        """r̂."""
        return sum(self.rates) / len(self.rates)

    @property
    def is_mixed(self) -> bool:
        """As Group.is_mixed."""
        return len(set(self.rates)) > 1


def summarise(group: Group, sampled: list[Response] | None = None, version: int = 0) -> GroupSummary:
    """The summary of a judged group. `sampled`: all of its answers, where some have been dropped; version: of the step's weights."""
    sampled = group.responses if sampled is None else sampled
    ages = [(version - of_run, count) for response in group.responses for of_run, count in response.version_runs]
    return GroupSummary(
        position=group.position,
        rates=tuple(response.verdict.score for response in group.responses),
        lengths=tuple(len(response.token_ids) for response in group.responses),
        sampled=len(sampled),
        truncated=sum(response.finish_reason == "length" for response in sampled),
        outcomes=Counter(response.verdict.outcome for response in sampled),
        staleness=(sum(age * count for age, count in ages), max((age for age, _ in ages), default=0)),
    )


def statistics(summaries: list[GroupSummary], kept: set[int]) -> dict[str, float]:
    """Numbers of one step over all groups that were decided in it, kept or not. Rates and lengths leave dropped answers out.

    kept: their positions. Of a choice of groups that favours short answers, kept_response_length beside response_length tells.
    """
    answered = [s for s in summaries if s.rates]
    trained = [s for s in answered if s.position in kept]
    rates, kept_rates = [s.correct_rate for s in answered], [s.correct_rate for s in trained]
    outcomes = sum((s.outcomes for s in summaries), Counter())
    tokens = sum(sum(s.lengths) for s in trained)
    return {
        "correct_rate": _mean(rates),
        "kept_correct_rate": _mean(kept_rates),
        "mixed_share": _mean([s.is_mixed for s in summaries]),
        "all_right_share": sum(rate == 1.0 for rate in rates) / max(len(summaries), 1),
        "all_wrong_share": sum(rate == 0.0 for rate in rates) / max(len(summaries), 1),
        "groups_decided": len(summaries),
        "groups_kept": len(kept),
        "response_length": _mean([length for s in answered for length in s.lengths]),
        "kept_response_length": _mean([length for s in trained for length in s.lengths]),
        "truncated_share": sum(s.truncated for s in summaries) / max(sum(s.sampled for s in summaries), 1),
        "staleness": sum(s.staleness[0] for s in trained) / max(tokens, 1),
        "staleness_max": max((s.staleness[1] for s in trained), default=0),
        **{f"outcome/{name}": outcomes[name] for name in OUTCOMES},
    }


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)

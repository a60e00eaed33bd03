"""Answers cut off at the limit, and DAPO's soft overlong penalty."""

import pytest

from megatron_nft.config import RewardConfig
from megatron_nft.rewards.length import is_dropped, overlong_penalty, settle
from megatron_nft.trajectories import Group, Prompt, Response, Verdict


@pytest.mark.parametrize("length, penalty", [(0, 0), (6, 0), (7, -0.25), (8, -0.5), (10, -1), (12, -1)])
def test_overlong_penalty(length, penalty):
    """Eq. 13 with L_max 10 and a buffer of 4: free up to 6 tokens, then a quarter a token."""
    assert overlong_penalty(length, max_tokens=10, buffer=4) == penalty


def group() -> Group:
    """Right and finished, wrong and finished, wrong and cut off, cut off with a right box in time."""
    answers = [(2, "stop", 1.0, "right"), (3, "stop", 0.0, "wrong"), (4, "length", 0.0, "no_answer"), (4, "length", 1.0, "right")]
    responses = [Response([5] * n, [0.0] * n, reason, 0, "", verdict=Verdict(score, said)) for n, reason, score, said in answers]
    return Group(Prompt("1", "", "", (1,), "set"), responses)


def settled(**settings) -> Group:
    made = group()
    for response in made.responses:
        settle(response, RewardConfig(**settings), max_tokens=4)
    return made


def test_wrong_is_the_default_and_takes_a_verdict_away():
    """Cut off: 0 in r̂, trained on in full. The judge's own word for a zero stays."""
    made = settled()
    assert [(r.verdict.score, r.verdict.outcome) for r in made.responses] == [(1, "right"), (0, "wrong"), (0, "no_answer"), (0, "wrong")]
    assert made.correct_rate == 0.25 and [sum(r.mask()) for r in made.responses] == [2, 3, 4, 4]


def test_mask_counts_in_the_rate_and_trains_nothing():
    made = settled(truncated="mask")
    assert made.correct_rate == 0.25 and [sum(r.mask()) for r in made.responses] == [2, 3, 0, 0]


def test_drop_is_as_if_never_sampled():
    made = settled(truncated="drop")
    made.responses = [response for response in made.responses if not is_dropped(response)]
    assert made.correct_rate == 0.5 and len(made.responses) == 2 and made.is_mixed


def test_penalties_are_apart_from_verdicts():
    made = settled(overlong_buffer=2)
    assert [r.penalty for r in made.responses] == [0, -0.5, -1, -1] and made.correct_rate == 0.25
    assert [r.penalty for r in settled().responses] == [0] * 4


def test_a_soft_group_is_mixed_where_its_verdicts_differ():
    made = group()
    for response in made.responses:
        response.verdict = Verdict(0.5, "right")
    assert not made.is_mixed
    made.responses[0].verdict = Verdict(0.6, "right")
    assert made.is_mixed

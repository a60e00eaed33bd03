"""Estimates and intervals, against counting and against closed forms."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import numpy
import pytest

from megatron_nft.config import SetSampling
from megatron_nft.evaluation.scores import (
    Answered,
    majority,
    mean_interval,
    mean_of_sets,
    pass_at,
    powers,
    resampled_means,
    set_result,
    wilson,
)


def answered(position: int, kind: str, right: list[bool], found: list[str | None] | None = None) -> Answered:
    outcomes = tuple("right" if one else "wrong" for one in right)
    return Answered("s", position, f"s/{position}", kind, tuple(map(float, right)), outcomes, tuple(found or map(str, right)),
                    tuple(range(1, len(right) + 1)), (False,) * len(right))  # fmt: skip


def test_pass_at_counts_the_draws():
    for n in range(1, 8):
        for correct in range(n + 1):
            verdicts = [True] * correct + [False] * (n - correct)
            for j in range(1, n + 1):
                assert pass_at(j, n, correct) == pytest.approx(fmean(map(any, combinations(verdicts, j))), abs=1e-12)


def test_powers():
    assert [powers(k) for k in (1, 2, 3, 8, 32)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 16, 32]]


def test_majority_by_counting():
    """Over many random votes: the mean verdict of the classes with the most votes, and nobody votes for no answer."""
    generator = numpy.random.default_rng(1)
    for _ in range(200):
        found = tuple(generator.choice(["1", "2", "3", None], size=6).tolist())
        right = str(generator.integers(1, 4))
        votes = Counter(answer for answer in found if answer is not None)
        best = [answer for answer, number in votes.items() if number == max(votes.values())]
        expected = sum(answer == right for answer in best) / len(best) if best else 0.0
        assert majority(found, tuple(float(answer == right) for answer in found)) == pytest.approx(expected)
    assert majority((None, None), (0.0, 0.0)) == 0.0


def test_a_set_by_hand():
    """Answers to two problems; the second is right in most votes, though only two of four answers are."""
    sampled = [answered(0, "sampled", [True, False, False, False], ["7", "8", "8", "9"]),
               answered(1, "sampled", [True, True, False, False], ["5", "5", "6", "7"])]  # fmt: skip
    result = set_result([answered(0, "greedy", [True]), answered(1, "greedy", [False]), *sampled], SetSampling(True, 4, 1.0, 1.0, 9))
    assert (result["problems"], result["greedy"], result["avg@4"], result["maj@4"]) == (2, 0.5, 3 / 8, 0.5)
    assert result["pass@1"] == pytest.approx(3 / 8) and result["pass@2"] == pytest.approx((1 / 2 + 5 / 6) / 2) and result["pass@4"] == 1.0
    assert result["greedy_interval"] == wilson(0.5, 2) and result["avg@4_interval"] == (0.25, 0.5) and result["no_answer_share"] == 0
    assert result["by_problem"] == [{"id": "s/0", "n": 4, "correct": 1, "score": 0.25, "greedy": 1.0},
                                    {"id": "s/1", "n": 4, "correct": 2, "score": 0.5, "greedy": 0.0}]  # fmt: skip


def test_greedy_verdicts_that_are_parts_of_a_point_have_no_interval_of_yes_and_no():
    greedy = [replace(answered(i, "greedy", [False]), scores=(0.25,)) for i in range(4)]
    result = set_result(greedy, SetSampling(True, 0, 1.0, 1.0, 9))
    assert result["greedy"] == 0.25 and result["greedy_interval"] == (0.25, 0.25)


def test_no_majority_where_the_verdict_function_tells_no_answers():
    result = set_result([answered(0, "sampled", [True, False], [None, "3"])], SetSampling(False, 2, 1.0, 1.0, 9))
    assert "avg@2" in result and not any(key.startswith("maj@") for key in result) and "greedy" not in result
    assert "maj@2" in set_result([answered(0, "sampled", [True, False])], SetSampling(False, 2, 1.0, 1.0, 9))


def test_wilson():
    """Values of the closed form, worked out by hand."""
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_is_the_spread_of_the_mean():
    """For 200 yes-or-no values the interval is 0.5 -+ 1.96 sqrt(0.25 / 200) = 0.069, up to the resampling's own noise."""
    low, high = mean_interval([[0.0, 1.0] * 100])
    assert low == pytest.approx(0.431, abs=0.01) and high == pytest.approx(0.569, abs=0.01)
    assert mean_interval([[0.25] * 9]) == (0.25, 0.25)


def test_resampled_means_are_of_problems_drawn_again():
    """Columns share the problems; the spread is that of drawing indices one by one."""
    values = numpy.random.default_rng(2).random((40, 2))
    values[:, 1] = 3 * values[:, 0]
    means = resampled_means(values, seed=5, resamples=4000)
    assert means.shape == (4000, 2) and numpy.allclose(means[:, 1], 3 * means[:, 0])
    indices = numpy.random.default_rng(6).integers(0, 40, (4000, 40))
    assert means[:, 0].std() == pytest.approx(values[:, 0][indices].mean(1).std(), rel=0.05)
    assert (means == resampled_means(values, seed=5, resamples=4000)).all()


def test_sets_count_the_same_and_are_resampled_each_by_itself():
    """Two sets of equal size: the variance of their mean is half that of one, because what is drawn of one says nothing of the other."""
    values = [0.0, 1.0] * 100
    low, high = mean_interval([values, values])
    assert high - low == pytest.approx((0.569 - 0.431) / 2**0.5, abs=0.012)
    sampling = {"a": SetSampling(False, 2, 1.0, 1.0, 9), "b": SetSampling(False, 2, 1.0, 1.0, 9)}
    one = set_result([answered(0, "sampled", [True, True])], sampling["a"])
    other = set_result([answered(i, "sampled", [False, False]) for i in range(9)], sampling["b"])
    mean = mean_of_sets({"a": one, "b": other}, sampling)
    assert mean == {"avg": {"value": 0.5, "interval": (0.5, 0.5), "of": {"a": "avg@2", "b": "avg@2"}}}
    assert mean_of_sets({"a": one}, {"a": sampling["a"]}) == {}

"""The benchmark of verdicts: its groups, and that it measures."""

import sys

import pytest

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import rewards  # noqa: E402


def test_groups_hold_spellings_of_the_gold_and_other_golds():
    golds, others = rewards.golds_of(None, 10)
    assert len(others) > 100 and not set(golds) & set(others)
    made = rewards.groups(golds)
    assert len(golds) == len(set(golds)) == len(made) == 10 and made == rewards.groups(golds)
    for prompt, answers in made:
        assert len(answers) == rewards.K and set(answers) <= {*golds, *rewards.spellings(prompt.answer)}


@pytest.mark.slow
def test_it_measures():
    found = rewards.measure([r"\frac{1}{2}", r"2\sqrt{3}", "x+1", "7"], ["x+2", "x+3"])
    assert min(found[name] for name in ("strict_box", "dapo", "math_verify", "plain", "ratio")) > 0 and found["agree"] > 0.9

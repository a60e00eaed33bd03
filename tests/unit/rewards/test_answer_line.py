r"""DAPO's answer line. The expected forms are worked out by hand from the published rule."""

import pytest

from megatron_nft.rewards.answer_line import dapo, normalise
from megatron_nft.trajectories import Verdict


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("34", "34"),
        (" 34 ", "34"),
        ("x = y = 34", "34"),
        ("$34$", "34"),
        ("\\$34", "34"),
        ("the value is $34$.", "34"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("1,\\!234", "1234"),
        ("1,234.5", "1,234.5"),  # commas go out of whole numbers alone
        ("(1, 2)", "(1,2)"),
        ("34 cm", "34"),
        ("34 square feet", "34"),
        ("34 \\text{ cm}^2", "34"),
        ("34\\text{ m}", "34"),
        ("45^\\circ", "45"),
        ("45^{\\circ}", "45"),
        ("45 degrees", "45"),
        ("7 \\mathrm{th}", "7"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\mbox{Evelyn}", "Evelyn"),
        ("\\textbf{34}", "34"),
        ("\\overline{AB}", "AB"),
        ("\\boxed{34}", "34"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac34x", "\\frac{3}{4}x"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("x \\text{ and } y", "x,y"),
        ("x, \\text{and} y", "x,y"),
        ("1, 2", "12"),  # a pair of whole numbers closes up to one
        ("a dozen", "dozen"),
        ('"yes"', "yes"),
        ("1,2,\\ldots", "12"),  # what is left is digits and commas
        ("pizza slice", "pizzslice"),  # articles go wherever they stand
        ("025", "025"),
    ],
)
def test_normalise(text, form):
    assert normalise(text) == form


@pytest.mark.parametrize(
    ("response", "gold", "verdict"),
    [
        ("so\nAnswer: 34", "34", Verdict(1.0, "right", "34")),
        ("so\nanswer : 34 ", " 34", Verdict(1.0, "right", "34")),
        ("ANSWER:\n\n 34", "34", Verdict(1.0, "right", "34")),
        ("Answer: 34\nAnswer: 35", "34", Verdict(0.0, "wrong", "35")),
        ("**Answer:** 34", "34", Verdict(0.0, "wrong", "**34")),
        ("Answer: 34 dollars", "\\$34", Verdict(1.0, "right", "34")),
        ("Answer: 0.5", "\\frac{1}{2}", Verdict(0.0, "wrong", "0.5")),
        ("Answer:", "34", Verdict(0.0, "no_answer")),
        ("\\boxed{34}", "34", Verdict(0.0, "no_answer")),
        ("Answer: 34" + "." * 290, "34" + "." * 290, Verdict(1.0, "right", "34" + "." * 290)),
        ("Answer: 34" + " " * 291, "34", Verdict(0.0, "no_answer")),  # the line begins before the last 300 characters
    ],
)
def test_the_last_answer_line_counts(response, gold, verdict):
    assert dapo(response, gold) == verdict

r"""Spellings that are rewritten before the library reads them, and amounts in different units."""

import pytest

from megatron_nft.rewards.prepared import label
from megatron_nft.rewards.tidy import tidy, words
from megatron_nft.rewards.units import in_common_units


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("2.55e-10", r"2.55 \times 10^{-10}"),
        ("2e + 3e", "2e + 3e"),  # Euler's number
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r".\overline{3}", r"\frac{1}{3}"),
        (r"33\frac{1}{3}\%", r"\frac{100}{3}\%"),
        ("1 1/2", r"1\frac{1}{2}"),
        ("1 000 000", "1000000"),
        (r"1\,000", "1000"),
        (r"(1,\,000)", r"(1,\,000)"),  # a comma and a space: a list
        ("１２．５", "12.5"),
        ("١٢", "12"),
        ("−7", "-7"),
        ("x²+y¹⁰", "x^{2}+y^{10}"),
        ("2½", r"2\frac{1}{2}"),
        ("Ⅻ", "12"),
        ("12厘米", "12"),
        ("甲", "甲"),
        (r"\textcolor{red}{5}", "5"),
        (r"{\frac{1}{2}}", r"\frac{1}{2}"),
        ("{1}/{2}", "{1}/{2}"),
        (r"\text{12 dollars}", r"12\text{ dollars}"),
        (r"7^{\text{th}}", "7"),
        (r"\sin 30^\circ", r"\sin(\frac{30\pi}{180})"),
        ("5.", "5"),
        ("]2,5[", "(2,5)"),
        ("[2,5[", "[2,5)"),
        (r"\text{No real solutions}", r"\emptyset"),
    ],
)
def test_tidy(text, plain):
    assert tidy(text) == plain
    assert tidy(plain) == plain  # nothing is rewritten twice


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (r"\text{Evelyn}", "evelyn", True),
        (r"\text{(B)}", "(B)", True),
        ("X", "x", False),  # two variables
        (r"\text{ab} 5", "AB5", False),
    ],
)
def test_words(one, other, equal):
    assert (words(one) == words(other)) is equal


@pytest.mark.parametrize(
    ("found", "gold", "amounts"),
    [
        (r"500 \text{ cm}", r"5 \text{ m}", (r"\left(500\right)\cdot\frac{1}{100}", "5")),
        (r"2 \text{ hours}", r"120 \mathrm{minutes}", (r"\left(2\right)\cdot\frac{60}{1}", "120")),
        (r"5 \text{ m}", r"5 \text{ hours}", None),
        (r"5 \text{ m}", "5", (r"5 \text{ m}", "5")),
        (r"5 \text{ apples}", r"5 \text{ m}", (r"5 \text{ apples}", r"5 \text{ m}")),
        (r"5 \text{ cm}", r"5 \text{ centimeters}", (r"5 \text{ cm}", r"5 \text{ centimeters}")),
    ],
)
def test_amounts_in_one_unit(found, gold, amounts):
    assert in_common_units(found, gold) == amounts


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["25", "025", "+25", "25.0", r"\frac{50}{2}", "50/2"], "25"),
        (["0.5", ".50", r"\dfrac{1}{2}", "1/2"], "1/2"),
        ([r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"], r"(3,\frac{\pi}{2})"),
    ],
)
def test_equal_answers_have_one_label(texts, name):
    assert {label(text) for text in texts} == {name}

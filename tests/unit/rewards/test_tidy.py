r"""Spellings that are rewritten before the library reads them, and amounts in different units."""

import signal
from itertools import product

import pytest

from megatron_nft.rewards.boxed import boxed
from megatron_nft.rewards.hedges import says_another
from megatron_nft.rewards.prepared import LONGEST_BOX, label, settle_cheaply
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
        ("]2, 5]", "(2, 5]"),
        ("]2,5,7[", "]2,5,7["),  # no interval
        ("[[1,2],[3,4]]", "[[1,2],[3,4]]"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"x+\dfrac{1}3", r"x+\dfrac{1}{3}"),
        (r"\frac1{23}4", r"\frac{1}{23}4"),
        (r"\text{5 or 6}", r"5\text{ or }6"),
        (r"x=5\text{ and 6}", r"x=5\text{ and }6"),
        ("5 不是", "5 不是"),  # no unit
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
        (r"5 \text{ apples}", r"5 \text{ m}", None),
        (r"5 \text{ red apples}", r"5 \text{ apples}", (r"5 \text{ red apples}", r"5 \text{ apples}")),
        (r"5 \text{ red apples}", r"5 \text{ green apples}", None),
        (r"5 \text{ cm}^2", r"5 \text{ square meters}", (r"\left(5\right)\cdot\frac{1}{10000}", "5")),
        (r"5 \text{ m}", r"5 \text{ m}^2", None),
        (r"18 \text{ km/h}", r"5 \text{ m}/\text{s}", (r"\left(18\right)\cdot\frac{5}{18}", "5")),
        (
            r"9 \mathrm{m\,s^{-2}}",
            r"9 \text{ meters per second squared}",
            (r"9 \mathrm{m\,s^{-2}}", r"9 \text{ meters per second squared}"),
        ),
        (r"5 \text{ kg}", r"5 \text{ pounds}", None),
        ("500 cm", "5 m", (r"\left(500\right)\cdot\frac{1}{100}", "5")),
        ("3m+2s", "3m+2h", ("3m+2s", "3m+2h")),  # variables
        (r"5 \text{ units}", r"5 \text{ cm}", (r"5 \text{ units}", r"5 \text{ cm}")),
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
        ([r"\text{Tuesday}", "Tuesday", r"\mathrm{tuesday}"], "tuesday"),
        (["1  2", "1 2"], "1 2"),
        ([r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"], r"(3,\frac{\pi}{2})"),
    ],
)
def test_equal_answers_have_one_label(texts, name):
    assert {label(text) for text in texts} == {name}


@pytest.mark.parametrize(
    "box",
    [
        r"0.\overline{" + "1" * 4400 + "}",
        "1" * 2200 + "." + "1" * 100 + r"\overline{" + "1" * 2200 + "}",
        "1" * 300 + "." + "1" * 300 + r"\overline{" + "1" * 300 + "}",
        "1" * 4400 + r"\frac{1}{2}\%",
        "1" * 300 + r"\frac{" + "1" * 300 + "}{" + "1" * 300 + r"}\%",
        r"\frac{1}{" + "1" * 4400 + "}",
    ],
)
def test_no_number_of_digits_raises(box):
    label(tidy(box))
    assert settle_cheaply(boxed(box), ("7",)) == (boxed(box), ("7",))


LEADS = ["", "1", "]", "a", r"\sin", r"\text{", r"\text{1", r"\frac"]
PIECES = [" ", ",", "~", "1", "1 ", ", ", "不", "1厘", "{}", r"\text{a}"]


def test_no_run_of_characters_takes_long():
    """Each takes some milliseconds of a processor's time; a pattern that looks at a run again from each place in it, a second and more."""
    hostile = [lead + piece * (LONGEST_BOX // len(piece)) + "x" for lead, piece in product(LEADS, PIECES)]
    hostile += ["]" + " " * 2400 + "," * 2400 + "x}", "]" + "," * 4900, "1" + "~" * 2400 + " " * 2400 + "[", "[" + "1," * 2400 + "1]"]
    before = signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail(f"{text[:12]!r} takes too long"))
    try:
        for text in hostile:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.5)
            says_another(label(tidy(text)), "5")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize(
    ("found", "gold", "says"),
    [
        ("5 or 6", "5", True),
        ("5 or 6", "5,6", False),
        (r"5\text{, maybe}", "5", True),
        (r"5\text{ (6)}", "5", True),
        (r"\text{Option }5", "5", False),
        (r"5\mathrm{m/s^2}", "5", False),
        (r"5\text{ m-1}", "5", False),
        (r"\text{not }5", "5", True),
        (r"\nothing", "5", False),
        ("x<5", "5", True),
        ("x<5", r"(-\infty,5)", False),
        ("x<5", r"x\le 6", False),
        ("P(X>3)=5", "5", False),
        (r"x\not= 5", "5", True),
        (r"1,000\text{ or }5", "1,000", True),
        (r"\text{if odd}", r"\text{if even}", False),
    ],
)
def test_answers_that_say_another_thing(found, gold, says):
    assert says_another(found, gold) is says

"""Symbolic equivalence. The cases are cheap and harmless, so they run in the test's own process."""

import json
import os

import pytest

from megatron_nft.rewards.symbolic import math_verify
from tests.support import REAL

LONG = os.environ.get("MEGATRON_NFT_LONG") == "1"
BENCHMARKS = ["math500", "olympiadbench", "minerva_math", "aime24"]
needs_data = pytest.mark.skipif(not (REAL / "math500.jsonl").exists(), reason="the real data is not on this machine")


@pytest.mark.parametrize(
    ("response", "gold", "outcome"),
    [
        (r"\boxed{0.5}", r"\frac12", "right"),
        (r"\boxed{\dfrac{2}{4}}", r"$\frac{1}{2}$", "right"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt 8", "right"),
        (r"\boxed{1,000}", "1000", "right"),
        (r"\boxed{\$57,500}", "57,500", "right"),
        (r"\boxed{(2,5]}", r"2<x\le 5", "right"),
        (r"\boxed{2<x\le 5}", "(2,5]", "right"),
        (r"\boxed{\text{Evelyn}}", "Evelyn", "right"),
        (r"\boxed{25}", "025", "right"),
        (r"\boxed{\frac13}", r"\frac12", "wrong"),
        (r"\boxed{3} no, \boxed{4}", "3", "wrong"),
        (r"\boxed{\frac12} and \boxed{\frac13}", r"\frac12, \frac13", "wrong"),  # the boxes are not joined into a set
        (r"\boxed{\text{Tuesday}}", r"\text{Evelyn}", "wrong"),
        (r"the answer is \frac12", r"\frac12", "no_answer"),
        ("the answer is 12", "12", "no_answer"),
        (r"\boxed{}", r"\frac12", "no_answer"),
        (r"\boxed{@@}", r"\frac12", "no_answer"),
    ],
)
def test_verdict(response, gold, outcome):
    assert math_verify(response, gold).outcome == outcome


def test_a_wrong_answer_has_one_name_for_the_vote():
    assert {math_verify(rf"\boxed{{{text}}}", "7").found for text in (r"2\sqrt{3}", r"2 \cdot \sqrt{3}", r"2\,\sqrt 3")} == {"2*sqrt(3)"}
    assert {math_verify(rf"\boxed{{{text}}}", r"\sqrt7").found for text in ("0.5", r"\frac12", "1/2")} == {"1/2"}


def test_the_box_is_looked_for_in_the_whole_response():
    assert math_verify(r"\boxed{0.5}" + " and so on" * 1000, r"\frac12").outcome == "right"


def golds_of(name: str, number: int) -> list[str]:
    """So many golds of a benchmark, from all over it."""
    rows = [json.loads(line) for line in (REAL / f"{name}.jsonl").read_text().splitlines()]
    return [row["answer"] for row in rows[:: max(1, len(rows) // number)]]


@needs_data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_of_a_benchmark_is_right(name):
    assert [gold for gold in golds_of(name, 40) if math_verify(rf"\boxed{{{gold}}}", gold).score != 1.0] == []


@needs_data
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if LONG or name != "minerva_math"])  # its formulas take SymPy seconds
def test_a_neighbours_gold_is_mostly_wrong(name):
    golds = golds_of(name, 40 if LONG else 10)
    taken_as_right = [pair for pair in zip(golds, golds[1:], strict=False) if math_verify(rf"\boxed{{{pair[0]}}}", pair[1]).score == 1.0]
    assert len(taken_as_right) <= len(golds) // 10

"""The built-in judges against a corpus of hard pairs: exactly the known disagreements, so that any change of a library shows."""

from collections import Counter

import pytest

from megatron_nft.rewards import Judge
from megatron_nft.rewards.prepared import LONGEST_CHEAP
from megatron_nft.trajectories import Prompt
from tests.unit.rewards import agreement

ROWS = agreement.load()
CATEGORIES = list(dict.fromkeys(row["category"] for row in ROWS))


@pytest.mark.parametrize("judge", agreement.JUDGES)
@pytest.mark.parametrize("category", CATEGORIES)
def test_exactly_the_known_disagreements(judge, category):
    own = [row for row in ROWS if row["category"] == category]
    differing = {row["id"]: said for row in own if agreement.disagrees(said := agreement.outcome(judge, row), row)}
    assert differing.keys() == {row["id"] for row in own if judge in row["differs"]}, differing


def prompt(gold):
    return Prompt("1", "q", gold, (), "s")


@pytest.mark.slow
def test_what_would_never_end_is_timed_out_and_the_pool_works_on():
    endless = [row for row in ROWS if row.get("endless")]
    asked = [(agreement.response_of(row), row["gold"]) for row in endless]
    asked.append((rf"\boxed{{{'(' * 300}1{')' * 300}}}", r"\sqrt2"))  # minutes
    long = "1" * (LONGEST_CHEAP + 1)  # a number, but one that a worker compares
    with Judge((), "math_verify", workers=2, time_limit=0.8) as judge:
        assert {future.result(60).outcome for future in [judge.submit(text, prompt(gold)) for text, gold in asked]} == {"timed_out"}
        assert judge.submit(rf"\boxed{{{long}}}", prompt(f"{long}.0")).result(60).outcome == "right"


def test_the_corpus_is_large_has_no_pair_twice_and_gives_a_reason_for_every_disagreement():
    pairs = Counter((agreement.response_of(row), row["gold"]) for row in ROWS)
    assert len(pairs) == len(ROWS) >= 300 and len({row["id"] for row in ROWS}) == len(ROWS)
    assert all(row["verdict"] in ("right", "wrong") and row["differs"].keys() <= set(agreement.JUDGES) for row in ROWS)
    assert all(reason for row in ROWS for reason in row["differs"].values())
    assert sum("math_verify" in row["differs"] for row in ROWS) == 19
    assert {row["verdict"] for row in ROWS if row.get("endless")} == {"wrong"}  # a time-out scores 0, so it agrees


def test_the_table_counts_what_was_said():
    rows = [{"category": "a", "verdict": "right"}, {"category": "a", "verdict": "wrong"}, {"category": "b", "verdict": "wrong"}]
    outcomes = {"strict_box": ["right", "no_answer", "right"], "dapo": ["wrong"] * 3, "math_verify": ["right", "right", "timed_out"]}
    assert list(agreement.table(rows, outcomes))[2:] == [
        "| a | 2 | 2 | 1 | 1 (1 too many) | 0 |",
        "| b | 1 | 0 (1 too many) | 1 | 1 | 0 |",
        "| all | 3 | 2 (1 too many) | 2 | 2 (1 too many) | 0 |",
    ]

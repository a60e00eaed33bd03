r"""What is settled before the computer algebra."""

import pytest

from megatron_nft.rewards.boxed import LONGEST_FOUND
from megatron_nft.rewards.prepared import LONGEST_BOX, LONGEST_CHEAP, compare_plainly, settle_cheaply
from megatron_nft.trajectories import Verdict


def right(found):
    return Verdict(1.0, "right", found)


def wrong(found):
    return Verdict(0.0, "wrong", found)


def test_integers_are_compared_as_integers_and_the_rest_is_left_to_the_library():
    assert compare_plainly(r"\boxed{25}" + " and so on" * 100, "025") == right("25")
    assert compare_plainly(r"\boxed{$-7$}", "-7") == right("-7")
    assert compare_plainly(rf"\boxed{{{10**400 + 1}}}", str(10**400)).outcome == "wrong"  # apart only beyond a float's digits
    assert compare_plainly("25", "25") == compare_plainly(r"\boxed{}", "25") == Verdict(0.0, "no_answer")
    assert compare_plainly(r"the sum \boxed{1} is \boxed{\sqrt2} .", "25") == r"\boxed{\sqrt2}"
    assert compare_plainly(r"\boxed{\frac12}", "25") == wrong("1/2")
    assert compare_plainly(r"\boxed{" + "9" * 4500 + "}", "25").startswith(r"\boxed{999")  # more digits than int() reads


@pytest.mark.parametrize("gold", [r"\frac13", r"\frac{1}{3}", r"\frac1{3}", r"\frac{1}3", "1/3", r"-\frac{-1}{3}"])
def test_a_fraction_is_one_number_in_any_spelling(gold):
    assert compare_plainly(r"\boxed{0.3333333333333}", gold).outcome == "wrong"
    assert compare_plainly(r"\boxed{\frac13}", gold) == right("1/3")


def test_the_same_text_is_right_whatever_it_is():
    assert compare_plainly(r"\boxed{ @@ }", "$@@$") == right("@@")


def test_of_several_golds_those_are_left_that_take_the_library():
    assert settle_cheaply(r"\boxed{7}", ("8", "7", r"\sqrt2")) == right("7")
    assert settle_cheaply(r"\boxed{7}", ("8", "9")) == wrong("7")
    assert settle_cheaply(r"\boxed{7}", ("8", r"\sqrt2", r"\sqrt{49}")) == (r"\boxed{7}", (r"\sqrt2", r"\sqrt{49}"))
    assert settle_cheaply("7", ("8", r"\sqrt2")).outcome == "no_answer"


@pytest.mark.parametrize("piece", ["{", r"\boxed{", r"\boxed{1}", "9", "answer: ", "$", r"\frac"])
def test_ten_megabytes_are_looked_at_near_their_end_only(piece):
    hostile = piece * (10_000_000 // len(piece))
    assert compare_plainly(hostile, "25").score == 0.0
    assert compare_plainly(hostile + r" \boxed{25}", "25") == right("25")


def test_a_box_of_any_length_is_right_where_it_is_the_gold():
    long = "x+" * LONGEST_BOX
    assert compare_plainly(rf"\boxed{{{long}}}", long).outcome == "right"
    assert compare_plainly(rf"\boxed{{{long}}}", "x").outcome == "wrong"


def test_what_is_long_is_left_to_a_worker(monkeypatch):
    monkeypatch.setattr("megatron_nft.rewards.prepared.tidy", None)
    box = "x+" * (LONGEST_CHEAP // 2) + "1"
    assert settle_cheaply(rf"so \boxed{{{box}}}.", ("7", "8")) == (rf"\boxed{{{box}}}", ("7", "8"))
    assert settle_cheaply(r"\boxed{1}", ("7", box)) == (r"\boxed{1}", ("7", box))


def test_a_long_answer_is_kept_by_its_beginning():
    long = "9" * 200_000
    found = settle_cheaply(rf"\boxed{{{long}}}", ("7", long)).found
    assert found == long[:LONGEST_FOUND] and settle_cheaply(rf"\boxed{{{long}}}", ("7",)).found == found

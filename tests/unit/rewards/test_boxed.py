r"""Finding the last \boxed{}, and the strict comparison."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.rewards.boxed import compare_integers, last_boxed, strict_box
from megatron_nft.trajectories import Verdict

RIGHT, WRONG, NO_ANSWER = Verdict(1.0, "right"), Verdict(0.0, "wrong"), Verdict(0.0, "no_answer")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # one escaped brace: no brace of LaTeX's
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{5} and \boxed{6", "5"),  # cut off
        (r"\boxed{5} and \boxed{6 {7}", "5"),
        (r"}} \boxed{5} }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\boxed {5}", None),
        (r"\fbox{5} boxed{5}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


CONTENT = st.recursive(
    st.sampled_from(["1", "x", r"\frac", r"\{", " "]),
    lambda part: part.map(lambda text: f"{{{text}}}") | st.tuples(part, part).map("".join),
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(), CONTENT)
def test_whatever_stands_before_it_the_last_box_is_found(before, content):
    before = before.rstrip("\\")
    assert last_boxed(rf"{before}\boxed{{{content}}} is the answer") == content.strip()


def lines_run(function, *arguments) -> int:
    """How many lines of Python a call runs."""
    lines, before = 0, sys.gettrace()

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("text", [r"\boxed{", "{", r"\boxed{1}", "}"])
def test_hostile_text_takes_linear_time(text):
    assert lines_run(last_boxed, text * 2000) < 2.1 * lines_run(last_boxed, text * 1000)


def test_hostile_text_is_read_to_its_end():
    assert last_boxed(r"\boxed{" * 100_000) is None
    assert last_boxed(r"\boxed{1} " + "{" * 500_000) == "1"


def test_strict_box_compares_character_for_character_in_the_last_100():
    assert strict_box(r"thus \boxed{ 12 }", " 12") == RIGHT
    assert strict_box(r"thus \boxed{12.0}", "12") == WRONG
    assert strict_box(r"thus \boxed{025}", "25") == WRONG
    assert strict_box("the answer is 12", "12") == NO_ANSWER
    box = r"\boxed{12}"
    assert strict_box(box + "." * (100 - len(box)), "12") == RIGHT
    assert strict_box(box + "." * (101 - len(box)), "12") == NO_ANSWER
    assert strict_box(rf"{box} no, \boxed{{13}}", "12") == WRONG


def test_integers_are_compared_as_integers_and_the_rest_is_left_to_the_library():
    assert compare_integers(r"\boxed{25}" + " and so on" * 100, "025") == RIGHT
    assert compare_integers(r"\boxed{$-7$}", "-7") == RIGHT
    assert compare_integers(rf"\boxed{{{10**400 + 1}}}", str(10**400)) == WRONG  # apart only beyond a float's digits
    assert compare_integers("25", "25") == NO_ANSWER
    assert compare_integers(r"\boxed{}", "25") == NO_ANSWER
    assert compare_integers(r"the sum \boxed{1} is \boxed{\frac12} .", "25") == r"\boxed{\frac12}"
    assert compare_integers(r"\boxed{" + "9" * 5000 + "}", "25").startswith(r"\boxed{999")  # more digits than int() reads

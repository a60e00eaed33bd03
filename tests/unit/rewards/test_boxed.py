r"""Finding the last \boxed{}, and the strict comparison."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.rewards.boxed import last_boxed, strict_box
from megatron_nft.trajectories import Verdict

NO_ANSWER = Verdict(0.0, "no_answer")


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


def right(found):
    return Verdict(1.0, "right", found)


def wrong(found):
    return Verdict(0.0, "wrong", found)


def test_strict_box_compares_character_for_character_in_the_last_100():
    assert strict_box(r"thus \boxed{ 12 }", " 12") == right("12")
    assert strict_box(r"thus \boxed{12.0}", "12") == wrong("12.0")
    assert strict_box(r"thus \boxed{025}", "25") == wrong("025")
    assert strict_box("the answer is 12", "12") == NO_ANSWER
    box = r"\boxed{12}"
    assert strict_box(box + "." * (100 - len(box)), "12") == right("12")
    assert strict_box(box + "." * (101 - len(box)), "12") == NO_ANSWER
    assert strict_box(rf"{box} no, \boxed{{13}}", "12") == wrong("13")

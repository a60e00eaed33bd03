r"""Answers in \boxed{...}: how the box is found, and the strict comparison of the paper."""

import re

from megatron_nft.trajectories import Verdict

STRICT_WINDOW = 100  # characters at the end of the response in which the published runs look for the box
LONGEST_FOUND = 2000  # characters kept of the answer that was found
_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")  # \{ and \} are characters of the answer, not braces

NO_ANSWER = Verdict(0.0, "no_answer")


def verdict(is_right: bool, found: str) -> Verdict:
    """Right or wrong, with the answer that was found, or the beginning of a long one."""
    return Verdict(1.0, "right", found[:LONGEST_FOUND]) if is_right else Verdict(0.0, "wrong", found[:LONGEST_FOUND])


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...}, without the spaces around it; None where there is none.

    One pass over the text, whatever it holds. Of two boxes inside one another the inner one counts. A bare `\boxed 5` is no box.
    """
    opened: list[int | None] = []  # start of the content for a box, None for any other brace
    last = None
    for brace in _BRACE.finditer(text):
        token = brace.group()
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
        elif token == "{":
            opened.append(None)
        elif token == r"\boxed{":
            opened.append(brace.end())
    return None if last is None else text[slice(*last)].strip()


def strict_box(response: str, answer: str) -> Verdict:
    """The verdict of the published runs: the last box within the last 100 characters equals the gold, character for character."""
    box = last_boxed(response[-STRICT_WINDOW:])
    return NO_ANSWER if box is None else verdict(box == answer.strip(), box)


def boxed(text: str) -> str:
    r"""\boxed{text}."""
    return rf"\boxed{{{text}}}"

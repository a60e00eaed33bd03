r"""Answers in \boxed{...}: how the box is found, the strict comparison of the paper, and the comparison of integers."""

import re

from megatron_nft.trajectories import Verdict

STRICT_WINDOW = 100  # characters at the end of the response in which the published runs look for the box
_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")  # \{ and \} are characters of the answer, not braces
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")

RIGHT, WRONG, NO_ANSWER = Verdict(1.0, "right"), Verdict(0.0, "wrong"), Verdict(0.0, "no_answer")


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
    if box is None:
        return NO_ANSWER
    return RIGHT if box == answer.strip() else WRONG


def compare_integers(response: str, answer: str) -> Verdict | str:
    """The cheap part of math_verify: a verdict where there is no box, or where box and gold are both integers.

    Otherwise the box alone, which is all of the response that the symbolic comparison looks at.
    """
    box = last_boxed(response)
    if not box:
        return NO_ANSWER
    found, gold = strip_dollars(box), strip_dollars(answer)
    if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(gold):
        return RIGHT if int(found) == int(gold) else WRONG
    return boxed(found)


def strip_dollars(text: str) -> str:
    """The text without spaces and dollar signs around it (signs of a sum of money or of TeX's mathematics)."""
    return text.strip().strip("$").strip()


def boxed(text: str) -> str:
    r"""\boxed{text}."""
    return rf"\boxed{{{text}}}"

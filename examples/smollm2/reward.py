"""A reward function of one's own: the last number of the response decides.

Used by dotted path: `reward.function: examples/smollm2/reward.py:last_number`.
"""

import re
from fractions import Fraction

NUMBER = re.compile(r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text in order, exact. "1,250" is one number; the hyphen of "10-4" is no sign.

    >>> numbers("From 1,250 take 2.50: 1,247.5.") == [1250, Fraction(5, 2), Fraction(2495, 2)]
    True
    """
    found = []
    for match in NUMBER.finditer(text):
        literal, before = match.group().replace(",", ""), text[: match.start()].rstrip()[-1:]
        minus_is_operator = before.isdigit() or before == ")"
        found.append(Fraction(literal.removeprefix("-") if minus_is_operator else literal))
    return found


def last_number(response: str, answer: str) -> float:
    """1.0 where the last number written in `response` equals the gold `answer`, else 0.0."""
    found = numbers(response)
    return float(bool(found) and found[-1] == Fraction(answer.replace(",", "")))

"""A rollout function of one's own: where the model writes "=", a calculator writes what stands before it comes to.

Used by its path: `rollout.function: examples/calculator/calculator.py:calculator`.
"""

import re

TERM = re.compile(r"(\d{1,9})([-+*])(\d{1,9})=$")


def calculator(prompt, answer):
    """The model writes a formula up to "=", the calculator its value, the model goes on after it; until the model ends the answer."""
    while (yield "="):
        formula = TERM.search(answer.text)
        if formula:  # anything else the model has to work out by itself
            answer.append(str(value(*formula.groups())))


def value(left: str, sign: str, right: str) -> int:
    """Of two whole numbers.

    >>> value("7", "*", "8"), value("56", "-", "60")
    (56, -4)
    """
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[sign]

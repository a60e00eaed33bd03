"""A rollout function of one's own: where the model writes "=", a calculator writes what stands before it comes to.

Used by its path: `rollout.function: examples/calculator/calculator.py:calculator`.
"""

import math
import re

FORMULA = re.compile(r"\d{1,9}(?:[-+*]\d{1,9}){1,9}(?==$)")


def calculator(prompt, answer):
    """The model writes a formula up to "=", the calculator its value, the model goes on after it; until the model ends the answer."""
    while (yield "="):
        formula = FORMULA.search(answer.text)
        if formula:  # anything else the model has to work out by itself
            answer.append(str(value(formula.group())))


def value(formula: str) -> int:
    """Of sums and differences of products of whole numbers.

    >>> value("7*8"), value("56-60"), value("37*7+43")
    (56, -4, 302)
    """
    products = re.findall(r"([-+]?)([\d*]+)", formula)
    return sum((-1 if sign == "-" else 1) * math.prod(map(int, product.split("*"))) for sign, product in products)

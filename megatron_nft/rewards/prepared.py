"""What is done to a boxed answer before the symbolic comparison: the verdicts that take no computer algebra."""

import re
from fractions import Fraction

from megatron_nft.rewards.boxed import NO_ANSWER, boxed, last_boxed, verdict
from megatron_nft.rewards.functions import best
from megatron_nft.rewards.hedges import says_another
from megatron_nft.rewards.tidy import tidy, words
from megatron_nft.trajectories import Verdict

WINDOW = 300_000  # characters at the end of a response in which the box is looked for: more than any real answer has
LONGEST_BOX = 5000  # characters; a longer one is right only where it is the gold's very text
LONGEST_CHEAP = 200  # characters of a box or a gold; longer ones are settled under the deadline
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,1000}(?:\.[0-9]{0,1000})?|\.[0-9]{1,1000})")
_RATIO = re.compile(r"([+-]?)\\[dtc]?frac\{([+-]?[0-9]{1,1000})\}\{(0*[1-9][0-9]{0,999})\}|([+-]?[0-9]{1,1000})/(0*[1-9][0-9]{0,999})")
_IN_BASE = re.compile(r"([0-9a-zA-Z]{1,1000})_\{?([0-9]{1,2})\}?")
_DECORATION = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;! ]|(?<=\\)[dtc](?=frac)")


def settle_cheaply(response: str, golds: tuple[str, ...]) -> Verdict | tuple[str, tuple[str, ...]]:
    """A verdict where it takes no computer algebra, or else what the symbolic comparison has to judge: the box, and which golds.

    What is longer than LONGEST_CHEAP is left to it as it is.
    """
    box = last_boxed(response[-WINDOW:])
    if not box:
        return NO_ANSWER
    if max(len(box), *map(len, golds)) > LONGEST_CHEAP and len(box) <= LONGEST_BOX:
        return boxed(box), golds
    verdicts = {gold: _compare_box(box, gold) for gold in golds}
    settled = [result for result in verdicts.values() if isinstance(result, Verdict)]
    left = tuple(gold for gold, result in verdicts.items() if isinstance(result, str))
    if settled and (best(settled).score == 1.0 or not left):
        return best(settled)
    return verdicts[left[0]], left


def compare_plainly(response: str, answer: str) -> Verdict | str:
    """The cheap part of math_verify: a verdict where there is no box, or where box and gold are numbers or the same words.

    Otherwise the box alone, which is all of the response that the symbolic comparison looks at.
    """
    box = last_boxed(response[-WINDOW:])
    return _compare_box(box, answer) if box else NO_ANSWER


def _compare_box(box: str, answer: str) -> Verdict | str:
    if len(box) > LONGEST_BOX:
        return verdict(strip_dollars(box) == strip_dollars(answer), box)
    found, gold = tidy(strip_dollars(box)), tidy(strip_dollars(answer))
    is_equal = _compare(found, gold)
    if is_equal is None and says_another(found, gold):
        is_equal = False
    return boxed(found) if is_equal is None else verdict(is_equal, label(gold if is_equal else found))


def strip_dollars(text: str) -> str:
    """The text without spaces and dollar signs around it (signs of a sum of money or of TeX's mathematics)."""
    return text.strip().strip("$").strip()


def label(text: str) -> str:
    """One spelling for an answer that has several: the number where it is a plain one, or the words without decoration."""
    value = _number(text)
    return words(_DECORATION.sub("", text)) if value is None else str(value)


def is_number(text: str) -> bool:
    """Whether it is a decimal or a fraction of integers."""
    return _number(text) is not None


def _compare(found: str, gold: str) -> bool | None:
    """None: it takes more than this."""
    if found and (words(found) == words(gold) or label(found) == label(gold)):
        return True
    one, other = _number(found), _number(gold)
    if one is not None and other is not None:
        return one == other
    one, other = _in_base(found), _in_base(gold)
    return one == other if one is not None and other is not None else None


def _number(text: str) -> Fraction | None:
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    ratio = _RATIO.fullmatch(text)
    if ratio is None:
        return None
    sign, top, bottom, whole, divisor = ratio.groups()
    return Fraction(int(top), int(f"{sign}1") * int(bottom)) if whole is None else Fraction(int(whole), int(divisor))


def _in_base(text: str) -> int | None:
    match = _IN_BASE.fullmatch(text)
    if match is None or not 2 <= int(match[2]) <= 36:
        return None
    digits = set(match[1].lower())
    return int(match[1], int(match[2])) if all(digit.isalnum() and int(digit, 36) < int(match[2]) for digit in digits) else None

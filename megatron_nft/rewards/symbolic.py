"""Symbolic equivalence of the boxed answer and the gold, by the math-verify library.

Importing this module imports SymPy (0.3 s), so it is imported in worker processes only.
"""

import logging
from functools import lru_cache

from math_verify import parse, verify
from sympy import Expr, UnevaluatedExpr

from megatron_nft.rewards.boxed import NO_ANSWER, boxed, last_boxed, verdict
from megatron_nft.rewards.prepared import compare_plainly, is_number, label, strip_dollars
from megatron_nft.rewards.tidy import tidy
from megatron_nft.rewards.units import in_common_units
from megatron_nft.trajectories import Verdict

LONGEST_LABEL = 500  # characters of an answer for whose name SymPy is asked

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it runs without time limits of its own


def math_verify(response: str, answer: str) -> Verdict:
    r"""The last \boxed{} of the whole response is worth the gold: 1/2 = 0.5, (2,5] = 2<x\le 5, 10\% = 0.1.

    Only the box is looked at: the library's own search also takes numbers outside it, and joins boxes into a set.
    "no_answer" is no box, or one that cannot be read as mathematics. May run forever on a hostile answer: the library's own
    limits cannot stop long integer arithmetic, and turn a time-out into "wrong"; so it runs without them, under the Judge's deadline.
    """
    quick = compare_plainly(response, answer)
    if isinstance(quick, Verdict):
        return quick
    found, gold = last_boxed(quick), tidy(strip_dollars(answer))
    amounts = in_common_units(found, gold)
    if amounts is None:
        return verdict(False, label(found))
    parsed, parsed_gold = map(_parsed, amounts)
    if not _are_apart(parsed, parsed_gold) and verify(list(parsed_gold), list(parsed), allow_set_relation_comp=True, timeout_seconds=None):
        return verdict(True, label(gold))
    if _has_mathematics(parsed) or not _has_mathematics(parsed_gold):
        return verdict(False, _name(found, parsed))
    return NO_ANSWER


@lru_cache(512)
def _parsed(text: str) -> tuple:
    """What the library reads; a group's gold is the same for all its answers."""
    return tuple(parse(boxed(text), parsing_timeout=None))


def _are_apart(parsed: tuple, gold: tuple) -> bool:
    """Whether both are numbers whose values differ at a glance: the library would simplify the difference, which takes most of its time.

    Percent stays with the library, to which 10% is 10 as well as 0.1.
    """
    one, other = _value(parsed[0] if parsed else None), _value(gold[0] if gold else None)
    return one is not None and other is not None and abs(one - other) > 1e-3 * max(abs(one), abs(other))


def _value(item: object) -> float | None:
    """None: no real number, or one too large or too small for this."""
    if not isinstance(item, Expr) or not item.is_number or item.has(UnevaluatedExpr):
        return None
    value = item.evalf(10)
    return float(value) if value.is_Float and 1e-100 < abs(value) < 1e100 else None


def _has_mathematics(parsed: tuple) -> bool:
    """Whether anything but plain strings was read."""
    return any(not isinstance(item, str) for item in parsed)


def _name(text: str, parsed: tuple) -> str:
    r"""A wrong answer's name for the vote: SymPy's spelling, which is one for 2\sqrt2 and 2 \cdot \sqrt{2}."""
    plain = label(text)
    if is_number(text) or len(text) > LONGEST_LABEL or not _has_mathematics(parsed):
        return plain
    try:
        return str(parsed[0])
    except ValueError:  # an integer of more digits than Python prints
        return plain

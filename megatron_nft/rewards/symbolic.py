"""Symbolic equivalence of the boxed answer and the gold, by the math-verify library.

Importing this module imports SymPy (0.3 s), so it is imported in worker processes only.
"""

import logging

from math_verify import parse, verify

from megatron_nft.rewards.boxed import NO_ANSWER, boxed, verdict
from megatron_nft.rewards.prepared import compare_plainly, strip_dollars
from megatron_nft.trajectories import Verdict

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
    found = parse(quick, parsing_timeout=None)
    gold = parse(boxed(strip_dollars(answer)), parsing_timeout=None)
    if verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None):
        return verdict(True, quick)
    return verdict(False, quick) if _has_mathematics(found) or not _has_mathematics(gold) else NO_ANSWER


def _has_mathematics(parsed: list) -> bool:
    """Whether anything but plain strings was read."""
    return any(not isinstance(item, str) for item in parsed)

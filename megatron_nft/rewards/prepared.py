"""What is done to a boxed answer before the symbolic comparison: the cheap verdicts."""

import re

from megatron_nft.rewards.boxed import NO_ANSWER, boxed, last_boxed, verdict
from megatron_nft.rewards.functions import best
from megatron_nft.trajectories import Verdict

WINDOW = 300_000  # characters at the end of a response in which the box is looked for: more than any real answer has
LONGEST_BOX = 5000  # characters; a longer one is right only where it is the gold's very text
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")


def settle_cheaply(response: str, golds: tuple[str, ...]) -> Verdict | tuple[str, tuple[str, ...]]:
    """A verdict where it takes no computer algebra, or else what the symbolic comparison has to judge: the box, and which golds."""
    verdicts = {gold: compare_plainly(response, gold) for gold in golds}
    settled = [result for result in verdicts.values() if isinstance(result, Verdict)]
    left = tuple(gold for gold, result in verdicts.items() if isinstance(result, str))
    if settled and (best(settled).score == 1.0 or not left):
        return best(settled)
    return verdicts[left[0]], left


def compare_plainly(response: str, answer: str) -> Verdict | str:
    """The cheap part of math_verify: a verdict where there is no box, where box and gold are the same text, or both integers.

    Otherwise the box alone, which is all of the response that the symbolic comparison looks at.
    """
    box = last_boxed(response[-WINDOW:])
    if not box:
        return NO_ANSWER
    found, gold = strip_dollars(box), strip_dollars(answer)
    if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(gold):
        return verdict(int(found) == int(gold), str(int(found)))
    if found == gold:
        return verdict(True, found)
    if len(found) > LONGEST_BOX:
        return verdict(False, found)
    return boxed(found)


def strip_dollars(text: str) -> str:
    """The text without spaces and dollar signs around it (signs of a sum of money or of TeX's mathematics)."""
    return text.strip().strip("$").strip()

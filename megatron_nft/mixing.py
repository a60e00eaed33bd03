"""How likely a group is to be mixed, and when enough prompts are sent: what the queue goes by, and the planner with it."""

import math

SURE = 1.0  # standard deviations: so many more prompts are sent than the chances promise to be enough ...
LEAST_SHARE = 0.05  # ... for which the share of mixed groups is taken as no smaller than this


def chance(share: float, alike: int, n: int) -> float:
    """That a group of n answers becomes mixed, of which `alike` have a verdict so far, all the same one.

    share: of all groups that are mixed. Where a mixed group has any number of right answers from 1 to n - 1 equally often, its first u
    verdicts are alike with the probability 2 (n - u) / ((n - 1)(u + 1)), u > 0; those of the other groups always are. Bayes does the rest.
    """
    if not alike:
        return share
    likely = share * 2 * (n - alike) / ((n - 1) * (alike + 1)) if n > 1 else 0.0
    return likely / (likely + 1 - share) if likely else 0.0


def is_short(promised: float, spread: float, missing: int) -> bool:
    """Whether more prompts are wanted. promised: the sum of the chances of the groups that are undecided; spread: that of chance x (1 -
    chance), the variance of how many become mixed; missing: mixed groups."""
    return missing > 0 and promised - SURE * math.sqrt(spread) < missing

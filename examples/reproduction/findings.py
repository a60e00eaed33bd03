"""The paper's findings, each held against the runs by one rule, so that nobody's hopes decide.

A difference between two arms is taken seed by seed. It is there when the 95 % interval of its mean (Student's t) leaves out 0;
otherwise the arms are not told apart here.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Protocol

from arms import OBJECTIVES, STRONG

ABOUT = 0.02  # accuracies this near are "about the same"
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # two-sided quantiles of Student's t, by number of seeds
STEADY = 0.05  # an entropy that changes by less has not changed


class Result(Protocol):
    sampled: float
    entropy: float


Results = dict[str, dict[int, Result]]


def findings(results: Results) -> list[str]:
    """A sentence for each finding whose arms are there."""
    lines = [line for check in (_objectives, _entropy, _ablations) for line in check(results)]
    strong = {name: results[STRONG(name)] for name in OBJECTIVES if STRONG(name) in results}
    return lines + [f"From the strong base: {line}" for check in (_objectives, _entropy) for line in check(strong)]


def difference(results: Results, a: str, b: str, key: str = "sampled") -> tuple[float, float, bool]:
    """(mean of a - b over the seeds both have, half of its 95 % interval, whether it is there by the rule above)."""
    pairs: list[float] = [getattr(results[a][seed], key) - getattr(results[b][seed], key) for seed in results[a] if seed in results[b]]
    if len(pairs) < 2:
        return (pairs or [math.nan])[0], math.inf, False
    mean = statistics.mean(pairs)
    half = T95.get(len(pairs), 2.0) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return mean, half, abs(mean) > half


def compare(results: Results, a: str, b: str, claim: str) -> Iterator[str]:
    """Whether a is above b, as the claim says."""
    if not {a, b} <= results.keys():
        return
    mean, error, there = difference(results, a, b)
    said = "not told apart" if not there else "holds" if mean > 0 else "the opposite"
    yield f"**{claim}**: {said}. {a} - {b} = {_points(mean, error)} in avg@4."


def _objectives(results: Results) -> Iterator[str]:
    yield from compare(results, "NFT", "RFT", "NFT is above RFT")
    if {"NFT", "DAPO"} <= results.keys():
        mean, error, there = difference(results, "NFT", "DAPO")
        said = "holds" if abs(mean) + error <= ABOUT else "does not hold" if there and abs(mean) > ABOUT else "not settled"
        claim = f"NFT is about equal to DAPO (within {100 * ABOUT:.0f} points, its interval included)"
        yield f"**{claim}**: {said}. NFT - DAPO = {_points(mean, error)} in avg@4."


def _entropy(results: Results) -> Iterator[str]:
    for name, claim, as_claimed in (
        ("RFT", "entropy falls under RFT", lambda change: change < -STEADY),
        ("NFT", "entropy does not fall under NFT", lambda change: change >= -STEADY),
    ):
        if name in results:
            changes = [one.entropy for one in results[name].values()]
            agree = sum(map(as_claimed, changes))
            said = "holds" if agree == len(changes) else "does not hold" if not agree else f"in {agree} of {len(changes)} seeds"
            yield f"**{claim}**: {said}. Its change by seed: {', '.join(f'{change:+.0%}' for change in changes)}."
    if {"NFT", "RFT"} <= results.keys():
        mean, error, there = difference(results, "NFT", "RFT", "entropy")
        said = "not told apart" if not there else "holds" if mean > 0 else "the opposite"
        yield f"**NFT keeps more entropy than RFT**: {said}. Difference of the changes: {_points(mean, error)}."


def _ablations(results: Results) -> Iterator[str]:
    named = results | ({"NFT (normalize 1, eps 1, neg_weight 1)": results["NFT"]} if "NFT" in results else {})
    default = "NFT (normalize 1, eps 1, neg_weight 1)"
    yield from compare(named, default, "eps 0.1", "eps near 0 hurts")
    yield from compare(named, default, "normalize 0", "normalize 1 is above 0")
    yield from compare(named, "normalize 2", "normalize 0", "normalize 2 is above 0")
    yield from compare(named, default, "neg_weight 0.0", "wrong answers help: neg_weight 1 is above 0")


def _points(mean: float, error: float) -> str:
    return f"{100 * mean:+.1f}" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "") + " points"

"""The chance that a group becomes mixed, against counting."""

from itertools import product
from math import comb

import pytest

from megatron_nft.mixing import chance, is_short


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_the_chance_is_that_of_counting_all_groups(n, share):
    """Every group of n verdicts with its probability: mixed ones have 1 .. n - 1 right answers equally often, in any order."""
    weight = {}
    for verdicts in product((0, 1), repeat=n):
        right = sum(verdicts)
        weight[verdicts] = share / (n - 1) / comb(n, right) if 0 < right < n else (1 - share) / 2
    for alike in range(n + 1):
        begun = {v: w for v, w in weight.items() if len(set(v[:alike])) < 2}
        mixed = sum(w for v, w in begun.items() if len(set(v)) == 2)
        total = sum(begun.values())
        assert chance(share, alike, n) == pytest.approx(mixed / total if total else 0.0, abs=1e-12)


def test_more_is_wanted_until_the_promise_is_sure():
    assert not is_short(0.0, 0.0, 0)  # nothing is missing
    assert is_short(10.0, 4.0, 9)  # 10 - 2 < 9
    assert not is_short(10.0, 4.0, 8)

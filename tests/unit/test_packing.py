"""What cannot be seen through batching.plan: the count of micro-batches, swaps, and the work a packing says it is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.packing import distribute


def test_the_count_is_a_multiple_also_where_a_packing_failed():
    """Three items of 60 need three micro-batches of 100 where their slots would fit into two: four, if there are to be an even number."""
    sizes, costs = np.full(3, 60), np.zeros(3, int)
    for multiple, count in ((1, 3), (2, 4), (3, 3)):
        assert [len(replica) for replica in distribute(sizes, costs, 1, 100, count_multiple=multiple).bins] == [count]


def test_swaps_find_what_dealing_misses():
    """Dealt, 7 + 3 + 3 and 6 + 5 + 0; swapped, 12 and 12."""
    costs = np.array([7, 6, 5, 3, 3, 0])
    packed = distribute(np.full(6, 10), costs, 2, 10)
    assert packed.work == 3 * 10 + 12
    assert [sum(costs[i] for batch in replica for i in batch) for replica in packed.bins] == [12, 12]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 500)), min_size=1, max_size=60), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_work_is_that_of_the_slowest_replica(items, replicas):
    sizes, costs = (np.array(column) for column in zip(*items))
    packed = distribute(sizes, costs, replicas, 64, multiple=1, unit=3)
    slowest = max(sum(int(costs[i]) for batch in replica for i in batch) for replica in packed.bins)
    assert packed.work == len(packed.bins[0]) * packed.slots * 3 + slowest
    assert packed.slots == max(sum(int(sizes[i]) for i in batch) for replica in packed.bins for batch in replica)

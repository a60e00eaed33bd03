"""Answers into micro-batches of one length, equally many on every replica, so that all replicas take equally long.

A pure function of integers: ties are broken by position, and costs are whole numbers, so every rank finds the same.

The work of a replica is its slots, which cost the same with a token or padding in them, and what `costs` says on top: the square of
attention. Slots are equal by construction; few of them (a tight packing) and equal sums of costs are what is looked for. Finding the
best is NP-hard. Here:
1. The tightest capacity at which best fit, longest first, needs no more bins than there are (MULTIFIT, Coffman, Garey and Johnson 1978).
2. Bins are dealt to the replicas, dearest first to the cheapest replica so far; then swapped between replicas while that helps.
3. Where few bins leave replicas uneven: once more, with the long items each into the cheapest bin, and best fit for the others only.
"""

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

_STEPS = 256  # capacities that are tried, as shares of the budget
_UNEVEN = 0.01  # of a replica's work: from here on, spreading by cost is tried in place of packing by size alone
_SPREAD = 0.8  # of the slots: the longest items, which have most of the cost; the others fill what is left
_GROWTH = (0.0, 0.01, 0.02, 0.03)  # how much longer micro-batches may become for that
_SWAPS = 64  # at most; each costs the slowest replica something


@dataclass(frozen=True)
class Packing:
    """Who holds what."""

    bins: list[list[list[int]]]  # [replica][micro-batch] -> items, longest first; a replica's dearest micro-batch first
    slots: int  # of every micro-batch
    work: int  # of the slowest replica: slots and costs, in units of `unit`


def distribute(
    sizes: np.ndarray, costs: np.ndarray, replicas: int, budget: int, multiple: int | None = None, count_multiple: int = 1, unit: int = 1
) -> Packing:
    """Pack items into as few micro-batches per replica as hold them within the budget.

    sizes: int [items], slots, none above `budget`. costs: int [items], what an item costs beyond its slots, in 1 / `unit` of a slot's
    cost. multiple: micro-batches are as short as they can be, in multiples of this, but no longer than the budget; None: as long as the
    budget. count_multiple: a replica has a multiple of so many micro-batches.
    """
    order = np.argsort(-sizes, kind="stable")
    sizes, costs = sizes[order], costs[order]
    each = count_multiple * max(1, -(-int(sizes.sum()) // (replicas * budget * count_multiple)))
    while (of_item := _tightest(sizes.tolist(), replicas * each, budget)) is None:
        each += count_multiple

    def packing(of_item: list[int]) -> Packing:
        bin_of, bins = np.array(of_item, np.int64), replicas * each
        fullest = max(1, int(_sums(bin_of, sizes, bins).max()))
        slots = min(budget, -(-fullest // multiple) * multiple) if multiple else budget
        rows, dearest = _deal(_sums(bin_of, costs, bins), replicas)
        members: list[list[int]] = [[] for _ in range(bins)]
        for item, b in zip(order.tolist(), of_item):
            members[b].append(item)
        return Packing([[members[b] for b in row] for row in rows], slots, each * slots * unit + dearest)

    tight = packing(of_item)
    if tight.work <= (1 + _UNEVEN) * (each * tight.slots * unit + int(costs.sum()) // replicas):
        return tight
    for growth in _GROWTH:
        capacity = min(budget, int(tight.slots * (1 + growth)))
        of_item = _spread(sizes.tolist(), costs.tolist(), replicas * each, capacity)
        if of_item is not None:
            return min(tight, packing(of_item), key=lambda found: found.work)
    return tight


def _tightest(sizes: list[int], bins: int, budget: int) -> list[int] | None:
    """The bin of each item at the least capacity at which best fit succeeds, by bisection; None where not even the budget is enough."""
    found = _best_fit(sizes, bins, budget)
    low, high = 0, min(_STEPS, budget)
    step = budget / high
    while found is not None and high - low > 1:
        middle = (low + high) // 2
        tighter = _best_fit(sizes, bins, int(middle * step))
        low, high, found = (low, middle, tighter) if tighter is not None else (middle, high, found)
    return found


def _best_fit(sizes: list[int], bins: int, capacity: int) -> list[int] | None:
    """Each item (longest first) into the fullest bin that has room; what is longer than the capacity has a bin to itself."""
    alone = bisect_left(sizes, -capacity, key=lambda size: -size)
    if alone > bins or sum(sizes[alone:]) > capacity * (bins - alone):
        return None
    return _fill(list(range(alone)), [0] * alone + [capacity] * (bins - alone), sizes)


def _spread(sizes: list[int], costs: list[int], bins: int, capacity: int) -> list[int] | None:
    """The longest items, _SPREAD of all slots, each into the bin of the least cost that has room; the others by best fit."""
    rooms, of_item = [capacity] * bins, []
    cheapest, left = [(0, b) for b in range(bins)], sum(sizes)
    few = (1 - _SPREAD) * left
    for size, cost in zip(sizes, costs):
        if left <= few:
            break
        full = []
        while cheapest and rooms[cheapest[0][1]] < size:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        so_far, b = cheapest[0]
        heapq.heapreplace(cheapest, (so_far + cost, b))
        rooms[b] -= size
        left -= size
        of_item.append(b)
        for entry in full:
            heapq.heappush(cheapest, entry)
    return _fill(of_item, rooms, sizes)


def _fill(of_item: list[int], rooms: list[int], sizes: list[int]) -> list[int] | None:
    """Items after those in `of_item`, which are placed already, each into the bin with the least room (slots, [bins]) that is enough."""
    bins = len(rooms)
    keys = sorted(room * bins + b for b, room in enumerate(rooms))  # room and bin in one number
    for size in sizes[len(of_item) :]:
        at = bisect_left(keys, size * bins)
        if at == len(keys):
            return None
        key = keys.pop(at)
        of_item.append(key % bins)
        insort(keys, key - size * bins)
    return of_item


def _deal(cost: np.ndarray, replicas: int) -> tuple[list[list[int]], int]:
    """The bins of each replica, dearest first, and what the dearest replica costs. cost: int [bins]."""
    load = np.zeros(replicas, np.int64)
    own = np.empty((replicas, len(cost) // replicas), np.int64)
    for i, dealt in enumerate(np.argsort(-cost, kind="stable").reshape(-1, replicas)):
        cheapest = np.argsort(load, kind="stable")
        own[cheapest, i] = dealt
        load[cheapest] += cost[dealt]
    _swap(own, load, cost)
    dearest_first = np.argsort(-cost[own], axis=1, kind="stable")
    return np.take_along_axis(own, dearest_first, axis=1).tolist(), int(load.max())


def _sums(of_item: np.ndarray, values: np.ndarray, bins: int) -> np.ndarray:
    """Whole-number sums of the items of each bin."""
    sums = np.zeros(bins, np.int64)
    np.add.at(sums, of_item, values)
    return sums


def _swap(own: np.ndarray, load: np.ndarray, cost: np.ndarray) -> None:
    """Swap a bin of the dearest replica for another's as long as the dearer of the two becomes cheaper. own: [replicas, bins of each] and
    load [replicas] are changed."""
    if own.shape[1] == 1:
        return
    for _ in range(_SWAPS):
        top = int(load.argmax())
        less = cost[own[top]][:, None, None] - cost[own]  # [bins of top, replicas, bins of each]
        after = np.maximum(load[top] - less, load[:, None] + less)
        after[:, top] = load[top]
        best = int(after.argmin())
        if after.flat[best] >= load[top]:
            return
        mine, other, theirs = np.unravel_index(best, after.shape)
        gain = less[mine, other, theirs]
        own[top, mine], own[other, theirs] = own[other, theirs], own[top, mine]
        load[top] -= gain
        load[other] += gain

"""Which slots each context-parallel rank holds."""

import pytest
import torch

from megatron_nft.policy.context import Places, slots


def test_slices_of_two_ranks_written_out():
    bounds = torch.tensor([0, 4, 12, 12], dtype=torch.int32)  # the last sequence, the padding, is empty
    assert slots(bounds, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert slots(bounds, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_slot_is_held_once_and_the_work_is_even(size):
    """Under causal attention a slot costs its position: the sum of them is the same for every rank."""
    lengths = torch.tensor([2, 10, 6]) * 2 * size
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    held = [slots(bounds, rank, size) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(int(bounds[-1])))
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    costs = [int(positions[own].sum()) for own in held]
    assert len(set(costs)) == 1 and len({len(own) for own in held}) == 1


def test_a_rank_alone_holds_all_and_gathers_nothing():
    places = Places(torch.tensor([0, 3, 8], dtype=torch.int32), None)
    values = torch.randn(8)
    assert places.own.tolist() == list(range(8)) and places.gather(values) is values

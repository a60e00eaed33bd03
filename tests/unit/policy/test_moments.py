"""The optimizer's states laid out for a checkpoint."""

from types import SimpleNamespace
from unittest import mock

import torch

from megatron_nft.policy import moments


def test_values_stand_where_their_parameters_are_padding_or_not():
    """Buckets of 3, 2 and 4 values, the first two padded to 4; Megatron's own function would lay them end to end."""
    sizes, states, buckets, ranges = (3, 2, 4), {}, [], []
    for number, (offset, size) in enumerate(zip((0, 4, 8), sizes)):
        buckets.append(SimpleNamespace(offset=offset, numel_unpadded=size, grad_data=torch.zeros(4)))
        ranges.append({"param_map": {number: {"gbuf_local": SimpleNamespace(start=0)}}})
        states[number] = {kind: torch.full((size,), number + k / 4) for k, kind in enumerate(("param", "exp_avg", "exp_avg_sq"), 1)}
    optimizer = SimpleNamespace(
        gbuf_ranges=[{"dtype": ranges}],
        buffers=[SimpleNamespace(buckets=buckets, numel_unpadded=9)],
        data_parallel_group=None,
        get_parameter_state_dp_zero=mock.Mock(return_value="Megatron's"),
        _get_main_param_and_optimizer_states=states.get,
    )
    moments.gather_in_place(optimizer)
    with mock.patch("torch.distributed.get_world_size", return_value=1):
        found = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)[0]["dtype"]
    for k, kind in enumerate(("param", "exp_avg", "exp_avg_sq"), 1):
        for number, (offset, size) in enumerate(zip((0, 4, 8), sizes)):
            assert found[kind][offset : offset + size].tolist() == [number + k / 4] * size
        assert len(found[kind]) == 12
    assert found["numel_unpadded"] == 9
    assert optimizer.get_parameter_state_dp_zero() == "Megatron's"  # other formats than the one that is used here

"""What Megatron's distributed optimizer gives its `fully_reshardable` checkpoints: float32 weights and moments, whole on every rank."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist


def gather_in_place(optimizer) -> None:
    """Let a DistributedOptimizer put its states together in one buffer a kind, each value at once where it belongs.

    Megatron's own way (0.16 to 0.19 alike) lays the buckets end to end without the padding at their ends, and then cuts parameters out
    where they are with it: behind a padded bucket all of them would be shifted in the file, with a warning at most. It also copies every
    value five times, and then collects garbage in the whole process: the training loop would wait for both. The buffers are kept: to get
    memory anew takes longer than to fill it.
    """
    distrib_optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    distrib_optimizer.gc = SimpleNamespace(collect=lambda: 0)  # "with GC disabled", which it is not here
    own, kept = optimizer.get_parameter_state_dp_zero, {}

    def gathered(use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False):
        if use_gloo_comm or not return_on_all_ranks:  # not what a `fully_reshardable` checkpoint asks for
            return own(use_gloo_comm, empty_data, return_on_all_ranks)
        state: dict = {"buckets_coalesced": True}
        for number, (ranges, buffer) in enumerate(zip(optimizer.gbuf_ranges, optimizer.buffers, strict=True)):
            [(dtype, buckets)] = ranges.items()
            if number not in kept:
                kept[number] = _buffers(optimizer, buffer.buckets)
            whole = kept[number]
            if not empty_data:
                for bucket, range_map in zip(buffer.buckets, buckets, strict=True):
                    _fill(whole, bucket, _shards(optimizer, range_map), optimizer.data_parallel_group)
            state[number] = {dtype: whole | {"numel_unpadded": buffer.numel_unpadded}}
        return state

    optimizer.get_parameter_state_dp_zero = gathered


def _buffers(optimizer, buckets: list) -> dict[str, torch.Tensor]:
    """Kind -> [elements of the buffer], on the host."""
    kinds = ("param", *getattr(optimizer, "optimizer_state_keys", ("exp_avg", "exp_avg_sq")))
    size = max(bucket.offset + bucket.numel_unpadded for bucket in buckets)
    return {kind: torch.empty(size, dtype=torch.float32, device="cpu") for kind in kinds}


def _shards(optimizer, range_map: dict) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(start in this rank's part of the bucket, state by kind) of every parameter that the rank has a part of."""
    for parameter, at in range_map["param_map"].items():
        yield at["gbuf_local"].start, optimizer._get_main_param_and_optimizer_states(parameter)


def _fill(whole: dict[str, torch.Tensor], bucket, shards: Iterator[tuple[int, dict[str, torch.Tensor]]], group) -> None:
    """Put one bucket's states into the buffers: this rank's at once where it is the only one, else by a gathering on the device."""
    ranks, shards = dist.get_world_size(group), list(shards)
    for kind, target in whole.items():
        part = target[bucket.offset : bucket.offset + bucket.numel_unpadded]
        if ranks > 1:
            part = torch.zeros(bucket.grad_data.numel() // ranks, dtype=torch.float32, device=bucket.grad_data.device)
        pairs = [(part[start : start + states[kind].numel()], states[kind].detach()) for start, states in shards]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        if ranks > 1:
            everyones = part.new_empty(bucket.grad_data.numel())
            dist.all_gather_into_tensor(everyones, part, group=group)
            target[bucket.offset : bucket.offset + bucket.numel_unpadded].copy_(everyones[: bucket.numel_unpadded])

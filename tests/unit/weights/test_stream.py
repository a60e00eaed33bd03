"""The stream of one rank, its plan for many, and the memory of its buckets. (tests/distributed/test_layouts.py has real ranks.)"""

import sys
import weakref
from itertools import chain

import pytest
import torch

from megatron_nft.weights import Bucket, Buffers, load_huggingface, stream
from megatron_nft.weights.buckets import ALIGNMENT, Slot
from megatron_nft.weights.stream import Ranks, Shard, plan
from tests.support import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def source(request, tmp_path_factory):
    return load_huggingface(tiny_model(tmp_path_factory.mktemp("model"), request.param, tie=False, num_key_value_heads=4))


def whole(source) -> list[tuple[str, torch.Tensor]]:
    """Every Megatron tensor of a model that is not cut."""
    return [(name, source.table.to_megatron(name, source.get)) for name in source.table.megatron_names()]


@pytest.mark.parametrize("limit", [1, 20_000, 2**28])
def test_one_rank_gives_every_tensor_in_order(source, limit):
    """In buckets of at most `limit` bytes, or of one Megatron tensor."""
    buckets = list(stream(iter(whole(source)), source.table, bucket_bytes=limit))
    streamed = [pair for bucket in buckets for pair in bucket.tensors()]
    assert [name for name, _ in streamed] == source.names()
    assert all(torch.equal(tensor, source.get(name)) for name, tensor in streamed)
    fused = max(len(source.table.hf_shapes_of(name)) for name in source.table.megatron_names())
    for bucket in buckets:
        assert bucket.buffer.dtype == torch.uint8 and all(slot.offset % ALIGNMENT == 0 for slot in bucket.slots)
        assert len(bucket.buffer) <= limit or len(bucket.slots) <= fused
        assert {t.untyped_storage().data_ptr() for _, t in bucket.tensors()} == {bucket.buffer.untyped_storage().data_ptr()}
    assert (len(buckets) == 1) == (limit == 2**28)


def test_copies_that_one_kernel_does_are_the_same(source, monkeypatch):
    """As on a GPU: what has no gaps on either side is copied together, the rest (queries, keys and values) apart."""
    module, calls, many = sys.modules[stream.__module__], [], torch._foreach_copy_

    def foreach(theirs, mine):
        calls.append(len(mine))
        assert all(t.is_contiguous() for t in (*theirs, *mine))
        many(theirs, mine)

    monkeypatch.setattr(module, "_fuses", lambda device: True)
    monkeypatch.setattr(torch, "_foreach_copy_", foreach)
    buckets = list(stream(whole(source), source.table))
    assert all(torch.equal(tensor, source.get(name)) for bucket in buckets for name, tensor in bucket.tensors())
    fused = sum("qkv" in name for name in source.table.megatron_names())  # each of three parts
    assert fused and calls == [len(source.names()) - 3 * fused]


def test_a_bucket_in_the_midst_of_memory():
    """Views of a buffer that is a part of another one, with tensors of several dtypes."""
    memory = torch.zeros(96, dtype=torch.uint8)
    slots = [Slot("a", (2, 3), torch.bfloat16, 0), Slot("b", (), torch.float32, 16), Slot("c", (4,), torch.float64, 32)]
    views = dict(Bucket(memory[16:80], slots).tensors())
    for name, value in (("a", 1.5), ("b", 2.5), ("c", 3.5)):
        views[name].fill_(value)
    assert memory[16:28].view(torch.bfloat16).tolist() == [1.5] * 6 and memory[32:36].view(torch.float32).tolist() == [2.5]
    assert memory[48:80].view(torch.float64).tolist() == [3.5] * 4 and not memory[:16].any() and not memory[80:].any()
    assert views["a"].shape == (2, 3) and views["a"].is_contiguous() and views["b"].shape == ()


def test_what_is_sent_is_what_values_makes_of_a_tensor(source):
    doubled = stream(whole(source), source.table, values=lambda tensor: tensor.double() * 2)
    for name, tensor in (pair for bucket in doubled for pair in bucket.tensors()):
        assert torch.equal(tensor, source.get(name).double() * 2), name


def test_a_tensor_that_no_rank_holds(source):
    with pytest.raises(ValueError, match="1 tensors of the model, among them decoder.final_layernorm.weight"):
        stream([pair for pair in whole(source) if "final_layernorm" not in pair[0]], source.table)


def test_plan_of_many_ranks(source):
    """TP4, PP2, and experts over the four ranks as EP2 x ETP2: all of the model once, within the limit, stage by stage."""
    table, limit, tp = source.table, 20_000, 4
    stages = [[], []]
    for name in table.megatron_names():
        if ".local_experts.2." in name or ".local_experts.3." in name:
            continue  # the other expert-parallel rank's
        size = 2 if ".experts." in name else tp
        shard = table.to_megatron(name, source.get, 1, size)
        late = name.startswith(("decoder.layers.2", "decoder.layers.3", "decoder.final", "output"))
        stages[late].append(Shard(name, tuple(shard.shape), shard.dtype))
    loads = list(plan(stages, table, Ranks(tp), Ranks(4, sets=2, experts=table.sizes.experts), limit))
    assert sorted(slot.name for load in loads for slot in load.slots) == sorted(source.names())
    assert [load.stage for load in loads] == sorted(load.stage for load in loads)
    assert all(load.nbytes <= limit or len(load.shards) == 1 for load in loads)
    for load in loads:
        for slot in load.slots:
            assert slot.shape == table.hf_shapes()[slot.name]
        ends = [slot.offset + torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in load.slots]
        assert all(end <= slot.offset for end, slot in zip(ends, load.slots[1:])) and ends[-1] <= load.nbytes


def test_a_buffer_is_used_again_when_nobody_views_it():
    buffers = Buffers()
    first = buffers.empty(1000, 1000, CPU)
    at, kept = first.data_ptr(), first[100:108].view(torch.float32)
    del first
    second = buffers.empty(1000, 1000, CPU)
    assert second.data_ptr() != at  # a view of the first is still there
    del kept
    assert buffers.empty(500, 1000, CPU).data_ptr() == at


def test_buffers_that_are_too_small_are_given_up():
    buffers = Buffers()
    assert len(buffers.empty(1000, 1000, CPU)) == 1000
    [(block, _)] = buffers._blocks
    gone = weakref.ref(block)
    del block
    assert len(buffers.empty(1500, 2000, CPU)) == 1500
    assert gone() is None and [len(block) for block, _ in buffers._blocks] == [2000]


def test_a_stream_keeps_no_bucket(source):
    """A consumer that keeps nothing makes do with one buffer; one that keeps the last tensor, with two."""
    for keep, most in ((False, 1), (True, 2)):
        buffers, places, kept = Buffers(), set(), []
        buckets = stream(whole(source), source.table, bucket_bytes=20_000, buffers=buffers)
        for _, tensor in chain.from_iterable(map(Bucket.tensors, buckets)):
            places.add(tensor.untyped_storage().data_ptr())
            kept[:] = [tensor] * keep
            del tensor
        assert len(places) == len(buffers._blocks) == most

"""Checksums do not ask how tensors are cut and fused, and are of the bits."""

import torch

from megatron_nft.checksums import Checksum, bit_sum, differing


def of(*tensors: torch.Tensor) -> Checksum:
    return Checksum(int(sum(bit_sum(t) for t in tensors)), str(tensors[0].dtype))


def test_a_sum_is_of_the_bits():
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert bit_sum(values) == bit_sum(values.t()) == bit_sum(values[:2]) + bit_sum(values[2:])
    changed = values.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0, dtype=torch.bfloat16))
    assert bit_sum(changed) != bit_sum(values)
    assert bit_sum(torch.tensor([0.0, -0.0])) != bit_sum(torch.zeros(2))
    assert bit_sum(torch.empty(0)) == 0
    assert bit_sum(torch.ones(4).to(torch.float8_e4m3fn)) == 4 * 0x38


def test_fused_tensors_are_compared_with_their_parts():
    q, k, v, norm = (torch.full((2, 3), float(n)) for n in range(4))
    trainer = {frozenset("qkv"): of(q, k, v), frozenset("n"): of(norm)}
    assert differing(trainer, trainer) == ([], frozenset("qkvn"))
    assert differing(trainer, {frozenset("n"): of(norm + 1)}) == (["n"], frozenset("n"))
    apart = {frozenset("q"): of(q), frozenset("k"): of(k), frozenset("v"): of(v)}
    assert differing(apart, {frozenset("qkv"): of(q, k, v)}) == ([], frozenset("qkv"))
    assert differing(apart, {frozenset("qkv"): of(q, k, v + 1)}) == (["k + q + v"], frozenset("qkv"))
    experts = {frozenset([f"experts.{i}"]): of(q + i) for i in range(8)}
    fused = {frozenset(f"experts.{i}" for i in range(8)): of(q)}
    assert differing(experts, fused)[0] == ["experts.0 + ... + experts.7 (8 tensors in one)"]


def test_what_cannot_be_compared_is_passed_over():
    q, k = torch.ones(2), torch.ones(3)
    assert differing({frozenset("qk"): of(q, k)}, {frozenset("q"): of(q + 1)}) == ([], frozenset()), (
        "only a part of what the trainer sums together"
    )
    assert differing({frozenset("q"): of(q)}, {frozenset("q"): of(q.bfloat16())}) == ([], frozenset()), "another dtype"
    assert differing({frozenset("q"): of(q)}, {frozenset("x"): of(k)}) == ([], frozenset()), "a tensor the trainer does not have"

"""The norm and the packed attention against formulas in float64."""

from types import SimpleNamespace

import pytest
import torch

from megatron_nft.policy.context import Places
from megatron_nft.policy.layers import PackedAttention, RMSNorm


@pytest.fixture(autouse=True)
def cpu_device(monkeypatch):
    """What policy/cpu.py redirects for a whole process."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), 16, eps=1e-5)
    x = 3 * torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
    wide = x.to(dtype).double()
    expected = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    got = norm(x.to(dtype))
    assert got.dtype == dtype and norm.weight.sequence_parallel
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


LENGTHS = {"uneven": [7, 1, 30, 2, 15, 14], "one and its padding": [12, 4], "with an empty padding": [3, 9, 0], "only padding": [5]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_attention(lengths):
    """Each sequence by itself, causal softmax written out, grouped queries; the last one, the padding, gives zeros. And its gradient."""
    torch.manual_seed(1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    packed = SimpleNamespace(cu_seqlens_q=bounds.int(), places=Places(bounds.int(), None))
    got = PackedAttention(None, 1, None, None)(q, k, v, None, packed_seq_params=packed)
    pieces = []
    for start, end in zip(bounds[:-2], bounds[1:-1], strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end].repeat_interleave(2, 1)) / 8**0.5
        future = torch.ones(end - start, end - start).triu(1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v[start:end].repeat_interleave(2, 1)).flatten(1))
    expected = torch.cat([*pieces, torch.zeros(lengths[-1], 32, dtype=torch.float64)])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if pieces:
        push = torch.randn_like(got)
        gradients = (torch.autograd.grad(output, (q, k, v), push) for output in (got, expected))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)

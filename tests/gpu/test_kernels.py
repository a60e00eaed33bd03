"""What replaces Transformer Engine on a GPU, and the log-probs, against formulas in wider numbers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_nft.policy.adam import Adam
from megatron_nft.policy.layers import PackedAttention, RMSNorm
from megatron_nft.policy.logprobs import Head, logprobs
from megatron_nft.policy.varlen import VarlenAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LENGTHS = [7, 1, 130, 2, 65, 51]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [4, 1])
def test_varlen_attention(dtype, groups):
    """Against our packed attention in float64, forward and backward; 2 % of the largest value is what bf16 keeps."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    wide = [torch.randn(sum(LENGTHS), heads, 64, device="cuda", dtype=dtype).double().requires_grad_() for heads in (4, groups, groups)]
    short = [t.detach().to(dtype).requires_grad_() for t in wide]
    packed = SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=max(LENGTHS))
    real = sum(LENGTHS[:-1])
    expected = PackedAttention(None, 1, None, None)(*wide, None, packed_seq_params=packed)[:real]
    got = VarlenAttention(None, 1, None, None)(*short, None, packed_seq_params=packed)
    assert got.isfinite().all()
    push = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(got[:real], short, push.to(dtype)), torch.autograd.grad(expected, wide, push))
    for mine, theirs in [(got[:real], expected), *pairs]:
        assert (mine.double() - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_fused_norm(dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 256, eps=1e-6)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    expected = F.rms_norm(x.double(), (256,), norm.weight.double(), 1e-6)
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_fused_adam_of_torch():
    torch.manual_seed(0)
    mine, theirs = ([torch.nn.Parameter(torch.ones(1000, device="cuda"))] for _ in range(2))
    ours, torchs = Adam(mine, lr=0.1, weight_decay=0.3), torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for _ in range(3):
        mine[0].grad = theirs[0].grad = torch.randn(1000, device="cuda")
        ours.step()
        torchs.step()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)])
def test_logprobs_equal_the_plain_way(dtype, tolerance):
    """Logits are never rounded to 16 bits: from the same operands, log-probs as in float64 to 1e-4; the gradients to 2 %."""
    torch.manual_seed(0)
    hidden = (torch.randn(1500, 256, device="cuda") / 16).to(dtype).requires_grad_()
    weight = torch.randn(5000, 256, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(0, 5000, (1500,), device="cuda")
    got, _ = logprobs(hidden, Head(weight, 5000), targets)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = (wide[0] @ wide[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    push = torch.randn(1500, device="cuda")
    for mine, theirs in zip(torch.autograd.grad(got, (hidden, weight), push), torch.autograd.grad(expected, wide, push.double())):
        assert (mine.double() - theirs).abs().max() < 0.02 * theirs.abs().max()

"""What replaces Transformer Engine on a GPU, and the log-probs, against formulas in wider numbers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_nft.policy.adam import Adam
from megatron_nft.policy.layers import PackedAttention, RMSNorm
from megatron_nft.policy.logprobs import Head, fused_loss, logprobs
from megatron_nft.policy.varlen import VarlenAttention
from tests.gpu.marks import needs_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [7, 1, 130, 2, 65, 51]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}  # of gradients, whose operands have that type


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in the largest value."""
    assert mine.isfinite().all()
    return ((mine.double() - theirs).abs().max() / theirs.abs().max()).item()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [4, 1])
def test_varlen_attention(dtype, groups, figures):
    """torch's against our packed attention in float64, forward and backward: 2 % of the largest value, which is what bf16 keeps."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    wide = [torch.randn(sum(LENGTHS), heads, 64, device="cuda", dtype=dtype).double().requires_grad_() for heads in (4, groups, groups)]
    short = [t.detach().to(dtype).requires_grad_() for t in wide]
    places = SimpleNamespace(size=1)
    packed = SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=max(LENGTHS), places=places)
    real = sum(LENGTHS[:-1])
    expected = PackedAttention(None, 1, None, None)(*wide, None, packed_seq_params=packed)[:real]
    got = VarlenAttention(None, 1, None, None)(*short, None, packed_seq_params=packed)
    assert got.isfinite().all()
    push = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(got[:real], short, push.to(dtype)), torch.autograd.grad(expected, wide, push))
    errors = [apart(mine, theirs) for mine, theirs in [(got[:real], expected), *pairs]]
    figures("0.02", output=errors[0], gradients=max(errors[1:]))
    assert max(errors) < 0.02


@needs_gpu  # on a CPU tests/unit/policy/test_layers.py
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_norm(dtype, tolerance, figures):
    """RMSNorm against float64: what rounding the result costs, 1e-6 in float32, 1e-2 in bf16, 2e-3 in fp16."""
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 256, eps=1e-6).to(DEVICE)
    x = torch.randn(64, 256, device=DEVICE, dtype=dtype)
    expected = F.rms_norm(x.double(), (256,), norm.weight.double(), 1e-6)
    figures(f"{tolerance}", error=apart(norm(x), expected))
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_our_adam_is_torchs(figures):
    """Three updates, one kernel each on a GPU: 1e-6."""
    torch.manual_seed(0)
    mine, theirs = ([torch.nn.Parameter(torch.ones(1000, device=DEVICE))] for _ in range(2))
    ours, torchs = Adam(mine, lr=0.1, weight_decay=0.3), torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for _ in range(3):
        mine[0].grad = theirs[0].grad = torch.randn(1000, device=DEVICE)
        ours.step()
        torchs.step()
    figures("1e-6", error=(mine[0] - theirs[0]).abs().max().item())
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)


def recomputing(hidden, head, targets, push, chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the loss: their sum weighted by `push`."""
    values, _ = logprobs(hidden, head, targets, chunk=chunk)
    return values, (values * push).sum()


def one_pass(hidden, head, targets, push, chunk) -> tuple[torch.Tensor, torch.Tensor]:
    found = []

    def loss_of(values, _, part):
        found.append(values.detach())
        return (values * push[part]).sum(), {}

    loss, _ = fused_loss(hidden, head, targets, loss_of, chunk=chunk)
    return torch.cat(found), loss


SIZES = {
    "small": (400, 128, 2000, 150),  # tokens, hidden, vocabulary, tokens of a chunk
    "152,064": (300, 1024, 152_064, None),  # Qwen2.5's vocabulary; as long chunks as the program takes
}


@pytest.mark.parametrize("size", ["small", pytest.param("152,064", marks=needs_gpu)])
@pytest.mark.parametrize("form", [recomputing, one_pass])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_logprobs_equal_the_plain_way(dtype, form, size, figures):
    """Both forms against float64, from the same operands, with rows of padding and a temperature. Logits are never rounded to 16 bits: the
    log-probs to 1e-4. The gradients, whose products have operands of the type: 1e-5 (float32), 2 % (bf16), 0.5 % (fp16) of the largest."""
    tokens, width, vocabulary, chunk = SIZES[size]
    g = torch.Generator(device=DEVICE).manual_seed(0)
    hidden = (2 * torch.randn(tokens, width, device=DEVICE, generator=g) / width**0.5).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary + 64, width, device=DEVICE, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE, generator=g)
    push = torch.randn(tokens, device=DEVICE, generator=g)
    got, loss = form(hidden, Head(weight, vocabulary, temperature=0.7), targets, push, chunk)
    mine = torch.autograd.grad(loss, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = (wide[0] @ wide[1][:vocabulary].T / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((expected * push.double()).sum(), wide)
    errors = [apart(a, b) for a, b in zip(mine, theirs)]
    figures(f"log-probs 1e-4, gradients {ROUNDING[dtype]}", logprobs=(got.double() - expected).abs().max().item(),
            hidden=errors[0], weight=errors[1])  # fmt: skip
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert max(errors) < ROUNDING[dtype]

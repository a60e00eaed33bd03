"""Both forms of the chunked log-probs against full logits, log_softmax and autograd; on two ranks in tests/distributed."""

import pytest
import torch

from megatron_nft.policy import logprobs as module
from megatron_nft.policy.logprobs import Head, fused_loss, logprobs


def plain(hidden, weight, targets, vocab_size, temperature=1.0):
    table = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    return table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


def make(dtype=torch.float64, tokens=13, hidden=6, vocab=11, padded=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, dtype=dtype, generator=g).requires_grad_()
    w = (torch.randn(padded, hidden, dtype=dtype, generator=g) / hidden**0.5).requires_grad_()
    return h, w, torch.randint(0, vocab, (tokens,), generator=g), vocab


def weighted(weights):
    """A loss that is a sum over tokens and not linear in the log-probs, with metrics of both kinds and the entropies where there are."""

    def loss_of(values, entropies, part):
        ratio = (values + 2.0).exp()
        metrics = {"count": torch.ones_like(values).sum(), "ratio_max": ratio.detach().max()}
        if entropies is not None:
            metrics["entropy"] = entropies.sum()
        return (weights[part] * ratio).sum(), metrics

    return loss_of


def weights_for(h):
    return torch.randn(len(h), dtype=h.dtype, generator=torch.Generator().manual_seed(9))


def by_form(form, h, head, targets, loss_of, with_entropy=False, chunk=None):
    if form == "one pass":
        return fused_loss(h, head, targets, loss_of, with_entropy, chunk)
    return loss_of(*logprobs(h, head, targets, with_entropy, chunk), slice(None))


FORMS = pytest.mark.parametrize("form", ["one pass", "recomputing"])


@FORMS
@pytest.mark.parametrize("chunk", [1, 4, 5, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_plain_way_in_float64(form, chunk, temperature):
    """Values, gradients, entropies and metrics to 1e-12, with a scalar upstream gradient that is not 1."""
    h, w, targets, vocab = make()
    loss_of = weighted(weights_for(h))
    expected, entropy = plain(h, w, targets, vocab, temperature)
    want_loss, want = loss_of(expected, entropy, slice(None))
    loss, metrics = by_form(form, h, Head(w, vocab, temperature), targets, loss_of, True, chunk)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-12)
    assert set(metrics) == set(want)
    for name in want:
        torch.testing.assert_close(metrics[name].detach(), want[name].detach(), rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(-3.0 * loss, (h, w)), torch.autograd.grad(-3.0 * want_loss, (h, w))):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_values_and_entropies_of_every_token(chunk):
    h, w, targets, vocab = make()
    expected, entropy = plain(h, w, targets, vocab, 0.7)
    values, entropies = logprobs(h, Head(w, vocab, 0.7), targets, with_entropy=True, chunk=chunk)
    torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropies, entropy, rtol=1e-12, atol=1e-12)
    assert not entropies.requires_grad and logprobs(h, Head(w, vocab, 0.7), targets)[1] is None


def test_entropy_of_a_nearly_certain_token():
    """Probabilities that underflow count nothing."""
    h, w, targets, vocab = make(torch.float32)
    _, entropies = logprobs(h * 1000, Head(w, vocab), targets, with_entropy=True)
    torch.testing.assert_close(entropies, plain(h * 1000, w, targets, vocab)[1].nan_to_num(0.0), rtol=1e-5, atol=2e-5)


@FORMS
def test_float32(form):
    """Log-probs to 1e-6, gradients to 1e-6 of their largest; columns of padding get no gradient."""
    h, w, targets, vocab = make(torch.float32, tokens=300, hidden=64, vocab=1000, padded=1024)
    loss_of = weighted(weights_for(h))
    expected, entropy = plain(h, w, targets, vocab)
    values, entropies = logprobs(h, Head(w, vocab), targets, True, chunk=128)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies, entropy, rtol=1e-6, atol=1e-6)
    loss, _ = by_form(form, h, Head(w, vocab), targets, loss_of, chunk=128)
    want = torch.autograd.grad(loss_of(expected, None, slice(None))[0], (h, w))
    for got, wanted in zip(torch.autograd.grad(loss, (h, w)), want):
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    loss, _ = by_form(form, h, Head(w, vocab), targets, loss_of, chunk=128)
    loss.backward()
    assert w.grad[vocab:].abs().max() == 0 and w.grad[:vocab].abs().max() > 0


@FORMS
def test_bfloat16_operands_give_float32_logits(form):
    """Log-probs as of the float32 copies of the operands, to 1e-6; gradients as theirs, rounded once to bfloat16 (2^-8)."""
    h, w, targets, vocab = make(torch.float32, tokens=40, hidden=32, vocab=200, padded=208)
    h16, w16 = (x.detach().bfloat16().requires_grad_() for x in (h, w))
    h32, w32 = (x.detach().float().requires_grad_() for x in (h16, w16))
    values, _ = logprobs(h16, Head(w16, vocab), targets, chunk=16)
    torch.testing.assert_close(values, plain(h32, w32, targets, vocab)[0], rtol=1e-6, atol=1e-6)
    loss_of = weighted(weights_for(h32))
    loss, _ = by_form(form, h16, Head(w16, vocab), targets, loss_of, chunk=16)
    want = torch.autograd.grad(loss_of(plain(h32, w32, targets, vocab)[0], None, slice(None))[0], (h32, w32))
    for got, wanted in zip(torch.autograd.grad(loss, (h16, w16)), want):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-6)


class Anew(torch.autograd.Function):
    """`of(h, w)`, computed again for every backward pass: gradcheck asks for several, a fused loss has one."""

    @staticmethod
    def forward(ctx, h, w, of):
        ctx.save_for_backward(h, w)
        ctx.of = of
        return of(h, w).detach()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            h, w = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            return *torch.autograd.grad(ctx.of(h, w), (h, w), grad), None


@FORMS
def test_gradcheck(form):
    h, w, targets, vocab = make(tokens=5)
    loss_of = weighted(weights_for(h))

    def of(h, w):
        return by_form(form, h, Head(w, vocab, 0.8), targets, loss_of, chunk=2)[0] * 1.7

    assert torch.autograd.gradcheck(lambda h, w: Anew.apply(h, w, of), (h, w))
    if form == "recomputing":
        assert torch.autograd.gradcheck(lambda h, w: logprobs(h, Head(w, vocab, 0.8), targets, chunk=2)[0], (h, w))


def test_a_fused_loss_goes_backward_once():
    h, w, targets, vocab = make()
    loss, _ = fused_loss(h, Head(w, vocab), targets, weighted(weights_for(h)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@FORMS
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_part_gets_no_gradient(form, frozen):
    h, w, targets, vocab = make()
    (h if frozen == "hidden" else w).requires_grad_(False)
    loss_of, trained = weighted(weights_for(h)), w if frozen == "hidden" else h
    loss, _ = by_form(form, h, Head(w, vocab), targets, loss_of, chunk=4)
    want = loss_of(plain(h, w, targets, vocab)[0], None, slice(None))[0]
    torch.testing.assert_close(*(torch.autograd.grad(x, trained)[0] for x in (loss, want)), rtol=1e-12, atol=1e-12)


def test_forward_only_computes_no_gradient(monkeypatch):
    h, w, targets, vocab = make()
    loss_of, head = weighted(weights_for(h)), Head(w, vocab)
    monkeypatch.setattr(module._Chunks, "accumulate", lambda *_: pytest.fail("a gradient was made"))
    with torch.no_grad():
        loss, _ = fused_loss(h, head, targets, loss_of)
    assert not loss.requires_grad
    fused_loss(h.detach(), Head(w.detach(), vocab), targets, loss_of)
    with pytest.raises(pytest.fail.Exception):
        fused_loss(h, head, targets, loss_of)


@FORMS
def test_no_tokens(form):
    h, w, _, vocab = make()
    nothing = torch.zeros(0, dtype=torch.long)
    loss, _ = by_form(form, h[:0], Head(w, vocab), nothing, lambda values, entropies, part: (values.sum(), {}), True)
    loss.backward()
    assert h.grad.abs().sum() == 0 and w.grad.abs().sum() == 0
    values, entropies = logprobs(h[:0], Head(w, vocab), nothing, with_entropy=True)
    assert values.shape == entropies.shape == (0,)


def test_parts_are_even_and_cover_every_token():
    assert module._cut(4096, 882) == [slice(i * 820, min(i * 820 + 820, 4096)) for i in range(5)]
    assert module._cut(5, 10) == [slice(0, 5)] and module._cut(0, 10) == [slice(0, 0)]


@pytest.mark.parametrize("denominator", [1e3, 1e5, 2e6])
def test_a_loss_scale_keeps_small_float16_gradients(denominator):
    """Handed to the one-pass form, fp16's loss scale is in its gradients before they are rounded: 1 % of float64's, zeros nowhere."""
    h, w, targets, vocab = make(tokens=64, hidden=16, vocab=31, padded=32)
    expected = torch.autograd.grad(65536 / denominator * plain(h, w, targets, vocab)[0].sum(), (h, w))
    small = h.detach().half().requires_grad_(), w.detach().half().requires_grad_()
    loss, _ = fused_loss(
        small[0], Head(small[1], vocab), targets, lambda values, *_: (values.sum() / denominator, {}), scale=65536.0, chunk=20
    )
    for mine, theirs in zip(torch.autograd.grad(65536.0 * loss, small), expected, strict=True):
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()


def wide_products(monkeypatch, release=(2, 11)) -> list[str]:
    """The CPU as a GPU that multiplies 16-bit operands into float32; which of torch's functions were asked to is in the list."""
    asked, mm = [], torch.mm

    def wide_mm(a, b, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        asked.append("mm")
        return mm(a.to(out_dtype), b.to(out_dtype))

    def wide_addmm(total, a, b, out_dtype, out):
        asked.append("addmm")
        assert out is total and out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        return out.add_(mm(a.float(), b.float()))

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(module, "_multiplies_wide", lambda device: True)
    monkeypatch.setattr(module.versions, "_release", lambda: release)
    return asked


@FORMS
@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("release", [(2, 10), (2, 11)])
def test_products_of_16_bit_operands_in_float32(form, chunk, release, monkeypatch):
    """As on a GPU: log-probs as from float64 operands to 1e-5, gradients to bf16's rounding of d logits and of the result."""
    h, w, targets, vocab = make(torch.float32, tokens=24, hidden=8, vocab=50, padded=64)
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (h, w)]
    h, w = (t.detach().bfloat16().requires_grad_() for t in (h, w))
    loss_of = weighted(weights_for(h).float())
    want, _ = loss_of(plain(*wide, targets, vocab, 0.7)[0], None, slice(None))
    asked = wide_products(monkeypatch, release)
    loss, _ = by_form(form, h, Head(w, vocab, 0.7), targets, loss_of, chunk=chunk)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(want, wide), strict=True):
        assert mine.dtype == torch.bfloat16 and (mine.double() - theirs).abs().max() < 0.01 * theirs.abs().max()
    assert ("addmm" in asked) == (release >= (2, 11))


def test_a_targets_gradient_is_rounded_once(monkeypatch):
    """softmax x grad and the target's own grad, of opposite signs and nearly alike, are summed before they are rounded to 16 bits: of a
    nearly certain target what is left is right to bf16's precision."""
    wide_products(monkeypatch)
    h, w = torch.tensor([[3.0, 0.0]]).bfloat16().requires_grad_(), torch.tensor([[2.0, 0.0], [0.0, 1.0]]).bfloat16().requires_grad_()
    values, _ = logprobs(h, Head(w, 2), torch.tensor([0]))
    d_hidden, d_weight = torch.autograd.grad(values.sum(), (h, w))
    left = 1 / (1 + torch.tensor(6.0).exp())  # 1 - softmax
    torch.testing.assert_close(d_weight.float()[:, 0], 3 * torch.stack([left, -left]), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(d_hidden.float()[0], torch.stack([2 * left, -left]), rtol=1e-2, atol=0.0)

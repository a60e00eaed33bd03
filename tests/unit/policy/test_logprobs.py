import pytest
import torch

from megatron_nft.policy.logprobs import entropies, logprobs


def plain(hidden, weight, targets, vocab_size, temperature):
    logits = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    return logits.gather(1, targets[:, None])[:, 0], -(logits.exp() * logits).sum(-1)


def make(dtype=torch.float64, tokens=13, hidden=6, vocab=11, padded=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, dtype=dtype, generator=g).requires_grad_()
    w = torch.randn(padded, hidden, dtype=dtype, generator=g).requires_grad_()
    return h, w, torch.randint(0, vocab, (tokens,), generator=g), vocab


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_plain_way_in_float64(chunk, temperature):
    h, w, targets, vocab = make()
    g = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    values = logprobs(h, w, targets, vocab, temperature, chunk=chunk)
    expected, entropy = plain(h, w, targets, vocab, temperature)
    torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-13)
    for got, want in zip(torch.autograd.grad(values, (h, w), g), torch.autograd.grad(expected, (h, w), g)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies(h, w, vocab, temperature, chunk=chunk), entropy, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    h, w, targets, vocab = make(tokens=5)
    assert torch.autograd.gradcheck(lambda h, w: logprobs(h, w, targets, vocab, 0.8, chunk=2), (h, w))


def test_float32_is_close_and_padding_columns_get_no_gradient():
    h, w, targets, vocab = make(torch.float32, tokens=300, hidden=64, vocab=1000, padded=1024)
    values = logprobs(h, w, targets, vocab, chunk=128)
    torch.testing.assert_close(values, plain(h, w, targets, vocab, 1.0)[0], rtol=1e-6, atol=2e-6)
    values.sum().backward()
    assert w.grad[vocab:].abs().max() == 0 and w.grad[:vocab].abs().max() > 0


def test_no_tokens():
    h, w, _, vocab = make()
    values = logprobs(h[:0], w, torch.zeros(0, dtype=torch.long), vocab)
    assert values.shape == (0,)
    values.sum().backward()
    assert h.grad.abs().sum() == 0
    assert entropies(h[:0], w, vocab).shape == (0,)

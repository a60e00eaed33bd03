"""Our Adam against torch's AdamW, and where it keeps its step."""

import copy

import torch

from megatron_nft.policy import versions
from megatron_nft.policy.adam import Adam


def parameters(seed: int) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,))]


def test_equals_torchs_adamw_to_the_last_bit():
    mine, theirs = parameters(0), parameters(0)
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    ours, torchs = Adam(mine, **settings), torch.optim.AdamW(theirs, **settings, foreach=True)
    for step in range(5):
        for a, b, gradient in zip(mine, theirs, parameters(step + 1), strict=True):
            a.grad, b.grad = gradient.detach(), gradient.detach()
        ours.step()
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert ours.param_groups[0]["step"] == 5


def test_a_parameter_without_gradient_stays():
    mine = parameters(0)
    mine[0].grad = torch.ones_like(mine[0])
    before = mine[1].detach().clone()
    Adam(mine, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(mine[1], before)


def test_state_goes_on_from_a_state_dict():
    """The step is in the param group: a loaded optimizer corrects its bias as the saved one would have."""
    first, second = parameters(0), parameters(0)
    saved = Adam(first, lr=0.1)
    for p in first:
        p.grad = torch.ones_like(p)
    saved.step()
    with torch.no_grad():
        for a, b in zip(first, second, strict=True):
            b.copy_(a)
            b.grad = torch.full_like(b, 2.0)
    loaded = Adam(second, lr=0.1)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for p in first:
        p.grad = torch.full_like(p, 2.0)
    saved.step()
    loaded.step()
    assert loaded.param_groups[0]["step"] == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_fused_form_is_the_same_update():
    """What runs on CUDA, on the CPU: torch's fused kernel, float32 to 1e-6."""
    mine, theirs = parameters(0), parameters(0)
    ours, torchs = Adam(mine, lr=0.1, weight_decay=0.3), torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for step in range(3):
        for a, b, gradient in zip(mine, theirs, parameters(step + 1), strict=True):
            a.grad, b.grad = gradient.detach(), gradient.detach()
        ours.step(fused=True)
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_fused_adam_that_wants_more_than_megatron_says():
    """optimizer.use_precision_aware_optimizer: Megatron-Core names the parameter, Transformer Engine 2.20 asks for one thing more."""

    class Fused:
        store_param_remainders = True

        def initialize_state(self, param, store_param_remainders):
            return store_param_remainders

    versions._complete(Fused)
    whole, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert [Fused().initialize_state(p) for p in (whole, half)] == [False, True] and Fused().initialize_state(half, False) is False
    completed = Fused.initialize_state
    versions._complete(Fused)
    versions._complete(Adam)
    assert Fused.initialize_state is completed and not hasattr(Adam, "initialize_state")

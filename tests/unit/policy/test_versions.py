"""Kernels that differ between builds: which are chosen, and how they are called. The kernels themselves need a GPU (tests/gpu)."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_nft import policy
from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import layers, model, versions
from megatron_nft.policy.adam import Adam
from megatron_nft.policy.context import Places
from megatron_nft.policy.varlen import VarlenAttention


def dense(query, key, value, cu_seqlens, scale=None):
    """Causal attention of each sequence by itself."""
    pieces = []
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(pieces)


def early(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    """The signature of PyTorch 2.10; heads must be equally many."""
    assert is_causal and query.shape == key.shape and max_q == max_k and cu_seq_q is cu_seq_k
    return dense(query, key, value, cu_seq_q, scale)


def late(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
    """The signature of PyTorch 2.13."""
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    repeats = query.shape[1] // key.shape[1]
    return dense(query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), cu_seq_q, scale)


@pytest.mark.parametrize("function", [early, late])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_varlen_attention_is_called_as_each_pytorch_has_it(function, scale, groups):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(10, 4, 8), (torch.randn(10, groups, 8) for _ in range(2))
    bounds = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
    got = versions.causal_varlen_attention(scale, function)(q, k, v, bounds, 5)
    expected = dense(q, k.repeat_interleave(4 // groups, 1), v.repeat_interleave(4 // groups, 1), bounds, scale)
    assert torch.equal(got, expected)


def test_this_pytorch_has_it_and_its_signature_is_known():
    from torch.nn.attention import varlen

    with pytest.raises((RuntimeError, NotImplementedError)):  # no GPU; not a TypeError: the arguments are right
        versions.causal_varlen_attention()(*(torch.randn(4, 2, 8, dtype=torch.bfloat16) for _ in range(3)), torch.tensor([0, 4]), 4)
    assert varlen.varlen_attn is not None


def test_equal_to_packed_attention_but_for_the_padding(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(versions, "causal_varlen_attention", lambda scale, made=versions.causal_varlen_attention: made(scale, late))
    q, (k, v) = torch.randn(12, 4, 8), (torch.randn(12, 2, 8) for _ in range(2))
    bounds = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    packed = SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=5, places=Places(bounds, None))
    got, ours = (cls(None, 1, None, None)(q, k, v, None, packed_seq_params=packed) for cls in (VarlenAttention, layers.PackedAttention))
    torch.testing.assert_close(got[:8], ours[:8], rtol=1e-6, atol=1e-6)
    assert got.shape == ours.shape and got.isfinite().all() and ours[8:].abs().max() == 0


@pytest.mark.parametrize(
    ("dtype", "cp", "gpu", "chosen"),
    [
        (torch.bfloat16, 1, True, VarlenAttention),
        (torch.float16, 1, True, VarlenAttention),
        (torch.float32, 1, True, layers.PackedAttention),
        (torch.bfloat16, 2, True, layers.PackedAttention),
        (torch.bfloat16, 1, False, layers.PackedAttention),
    ],
)
def test_which_attention(dtype, cp, gpu, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert model.attention_module(dtype, cp) is chosen


def test_the_fused_norm_is_the_same_norm(monkeypatch):
    """What runs on CUDA, on the CPU: float32 to 1e-6."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    torch.manual_seed(0)
    norm = layers.RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
    x = torch.randn(5, 16)
    torch.testing.assert_close(F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps), norm(x), rtol=1e-6, atol=1e-6)


@pytest.fixture
def megatron_optimizer(monkeypatch):
    """Megatron's optimizer module, put back afterwards."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    for module, name in (
        (optimizer, "Adam"),
        (optimizer, "USING_PYTORCH_OPTIMIZER"),
        (distrib_optimizer, "Adam"),
        (distrib_optimizer, "HAVE_APEX_OR_TE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    return optimizer


def test_a_fused_adam_is_kept_where_it_can_run(megatron_optimizer, monkeypatch):
    fused = type("FusedAdam", (), {"__module__": "transformer_engine.pytorch.optimizers"})
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = fused, False
    assert versions.fused_adam() == "Transformer Engine"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    versions.provide_adam()
    assert megatron_optimizer.Adam is fused
    fused.__module__ = "apex.optimizers"
    assert versions.fused_adam() == "Apex"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    versions.provide_adam()
    assert megatron_optimizer.Adam is Adam and versions.fused_adam() is None


def test_without_one_ours_is_given_on_a_gpu_too(megatron_optimizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    versions.provide_adam()
    assert megatron_optimizer.Adam is Adam and not megatron_optimizer.USING_PYTORCH_OPTIMIZER


def test_parameters_in_fp8_are_filled_and_read_as_plain_ones(monkeypatch):
    """A stand-in for TE's quantized tensor: rounding on copy, and the unrounded values kept for the optimizer."""
    from megatron.core import fp8_utils

    parameter = torch.nn.Parameter(torch.zeros(3))
    versions.set_values(parameter, torch.tensor([1.0, 2.0, 3.1]))
    assert versions.values_of(parameter).data_ptr() == parameter.data_ptr()
    unrounded = torch.zeros(3)
    parameter.get_high_precision_init_val = lambda: unrounded
    versions.set_values(parameter, torch.tensor([1.0, 2.0, 3.2]))
    assert torch.equal(unrounded, torch.tensor([1.0, 2.0, 3.2])) and torch.equal(parameter.data, unrounded)
    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: True)
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", lambda tensor: tensor.data + 1)
    assert torch.equal(versions.values_of(parameter), unrounded + 1)


@dataclass
class EarlyRecipe:
    margin: int = 0
    override_linear_precision: tuple = (False, False, False)


@dataclass
class LateRecipe:
    margin: int = 0


@pytest.mark.parametrize("recipe", [EarlyRecipe, LateRecipe])
def test_megatrons_delayed_recipe_is_made_by_each_transformer_engine(recipe, monkeypatch):
    """2.20 does not take the argument by which Megatron-Core keeps products out of FP8."""
    module = ModuleType("transformer_engine.common.recipe")
    module.DelayedScaling = recipe
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(recipe, "__init__", recipe.__init__)  # put back at the end

    class Megatrons(recipe):
        def __init__(self, override: tuple):
            super().__init__(margin=2, override_linear_precision=override)

    for _ in range(2):  # every model does it
        versions.mend_delayed_scaling()
    assert Megatrons((False, False, False)).margin == 2
    if recipe is EarlyRecipe:
        assert Megatrons((False, False, True)).override_linear_precision == (False, False, True)
    else:
        with pytest.raises(UserError, match="fp8_wgrad"):
            Megatrons((False, False, True))


def test_gradients_are_added_in_the_product_without_apex():
    """A model of Transformer Engine's layers has an output layer of Megatron-Core's own, which refuses the setting without Apex."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    config = Config(run_dir="unused")
    config.model.precision, config.megatron.transformer["gradient_accumulation_fusion"] = "fp32", True
    hf = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32,
          "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "model_type": "qwen2", "tie_word_embeddings": True}  # fmt: skip
    policy.initialize(config.parallel, seed=1)
    try:
        megatron = model.transformer_config(hf, config)
        with versions.fused_accumulation_in_layers(True):
            ColumnParallelLinear(16, 32, config=megatron, init_method=None, bias=False)
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"), versions.fused_accumulation_in_layers(False):
            ColumnParallelLinear(16, 32, config=megatron, init_method=None, bias=False)
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            model.build(hf, config)  # without Transformer Engine
    finally:
        policy.shutdown()

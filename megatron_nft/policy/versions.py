"""What differs between Megatron-Core 0.16 and 0.19, between builds of Transformer Engine and Apex, and between PyTorch 2.10 and 2.13."""

import importlib.metadata
import importlib.util

import torch


def version() -> str:
    """Megatron-Core's version as imported (a copy on PYTHONPATH hides the installed one)."""
    import megatron.core

    return megatron.core.__version__


def have_transformer_engine() -> bool:
    """Whether Megatron-Core found Transformer Engine, and a GPU to run it."""
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.HAVE_TE and torch.cuda.is_available()


def have_fused_accumulation() -> bool:
    """Whether a kernel is there that adds a weight's gradient onto the float32 buffer: Apex's for local layers, TE's own for its."""
    return have_transformer_engine() or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fp8_side(recipe: str) -> int:
    """What the sides of an FP8 multiplication must divide by."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    return get_fp8_align_size(Fp8Recipe[recipe])

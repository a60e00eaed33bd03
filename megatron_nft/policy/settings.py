"""What Megatron-Core has to be told beyond the model's shape: from the config to the fields of its three config classes."""

import difflib
import types
import typing
from enum import Enum
from typing import Any

import torch

from megatron_nft.config import Config, known_keys
from megatron_nft.errors import UserError

# fp8 is Megatron's own reading of it; fp64 is no setting of a run (Megatron's optimizer has none), but gradients can be had in it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8, "fp64": torch.float64}

# Megatron's fields that go by another name here; the others have their own, in the sections of _SECTIONS.
_OURS = {
    "fp8_param": "model.fp8_param_gather",
    "fp16": "model.precision",
    "bf16": "model.precision",
    "params_dtype": "model.precision",
    "pipeline_dtype": "model.precision",
}
_SECTIONS = ("model", "parallel", "optimizer", "train")

# Megatron's fields that cannot be passed through, whatever their value.
_FROM_THE_MODEL = """activation_func_clamp_value apply_query_key_layer_scaling apply_residual_connection_post_layernorm
    attention_output_gate experimental_attention_variant glu_linear_offset heterogeneous_block_specs layernorm_zero_centered_gamma
    moe_ffn_hidden_size moe_layer_freq moe_router_enable_expert_bias moe_router_pre_softmax moe_router_score_function moe_router_topk
    moe_router_topk_scaling_factor moe_shared_expert_gate moe_shared_expert_intermediate_size mtp_num_layers multi_latent_attention
    no_rope_freq num_moe_experts rotary_interleaved softmax_scale softmax_type use_te_activation_func window_attn_skip_freq window_size"""
# Megatron multiplies auxiliary losses by the tokens of a micro-batch, which its own reduction divides out again and ours does not.
_AUXILIARY = "moe_aux_loss_coeff moe_z_loss_coeff"
_ANOTHER_WAY = """average_in_collective cpu_offloading cuda_graph_impl cuda_graph_scope decoupled_weight_decay enable_cuda_graph
    external_cuda_graph fine_grained_activation_offloading num_distributed_optimizer_instances use_megatron_fsdp"""
_REFUSED = {
    **dict.fromkeys(_FROM_THE_MODEL.split(), "leave it out: it decides what the model computes, as config.json does and vLLM goes by"),
    **dict.fromkeys(_AUXILIARY.split(), "leave it out: the published objectives have no auxiliary loss"),
    **dict.fromkeys(_ANOTHER_WAY.split(), "leave it out: this program trains another way"),
}


def precision_of(setting: str) -> str:
    """ "bf16", "fp16" or "fp32"; `auto` is bf16 where CUDA is present and fp32 elsewhere."""
    if setting == "auto":
        return "bf16" if torch.cuda.is_available() else "fp32"
    return setting


def dtype_of(setting: str) -> torch.dtype:
    """The torch dtype of model.precision."""
    return DTYPES[precision_of(setting)]


def transformer(config: Config) -> dict[str, Any]:
    """TransformerConfig's fields for precision, recomputation and FP8."""
    dtype, train, model = dtype_of(config.model.precision), config.train, config.model
    full = train.recompute_granularity == "full"
    settings = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "recompute_granularity": train.recompute_granularity,
        "recompute_method": train.recompute_method or ("uniform" if full else None),
        "recompute_num_layers": train.recompute_num_layers or (1 if full else None),
        "recompute_modules": train.recompute_modules,
        "fp8": model.fp8,
        "fp8_param": model.fp8_param_gather,
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
    }
    return settings | ({"fp8_recipe": model.fp8_recipe} if model.fp8 else {})


def ddp(config: Config) -> dict[str, Any]:
    """DistributedDataParallelConfig's fields. Gradients are reduced while the backward pass runs where there is CUDA, unless set."""
    overlap = config.parallel.overlap_grad_reduce
    return {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": torch.cuda.is_available() or config.parallel.overlap_param_gather if overlap is None else overlap,
        "overlap_param_gather": config.parallel.overlap_param_gather,
        "fp8_param_gather": config.model.fp8_param_gather,
    }


def optimizer(config: Config) -> dict[str, Any]:
    """OptimizerConfig's fields."""
    settings, dtype = config.optimizer, dtype_of(config.model.precision)
    return {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": 0.0,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
        "clip_grad": settings.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "fp8_recipe": config.model.fp8_recipe if config.model.fp8 else None,
        "use_distributed_optimizer": True,
        "overlap_param_gather": config.parallel.overlap_param_gather,
        "optimizer_cpu_offload": settings.optimizer_cpu_offload,
        "optimizer_offload_fraction": settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 0.0,
        "use_precision_aware_optimizer": settings.use_precision_aware_optimizer,
        "main_grads_dtype": DTYPES[settings.main_grads_dtype],
        "main_params_dtype": DTYPES[settings.main_params_dtype],
        "exp_avg_dtype": DTYPES[settings.exp_avg_dtype],
        "exp_avg_sq_dtype": DTYPES[settings.exp_avg_sq_dtype],
        "initial_loss_scale": settings.initial_loss_scale,
        "min_loss_scale": settings.min_loss_scale,
        "loss_scale_window": settings.loss_scale_window,
        "hysteresis": settings.hysteresis,
    }


def complete(kind: str, cls: type, own: dict[str, Any], config: Config, defaults: dict[str, Any] | None = None) -> Any:
    """An object of Megatron's config class `cls`: `own` fields, those of the config's megatron.<kind>, and `defaults` for neither.

    Raises UserError for a field that Megatron does not have (it names the nearest), one in `own`, and a value of the wrong type.
    """
    hints, values = typing.get_type_hints(cls), {}
    for name, value in getattr(config.megatron, kind).items():
        key = f"megatron.{kind}.{name}"
        if name in _REFUSED:
            raise UserError(f"{key} is set, and is none of the fields that are passed through", _REFUSED[name])
        if name in own:
            raise UserError(f"{key} is set, but this program sets that field itself", _mend(name))
        if name not in hints or name.startswith("_"):
            near = difflib.get_close_matches(str(name), list(hints), 1)
            raise UserError(f"{key} is no field of this Megatron-Core's {cls.__name__}",
                            f"did you mean {near[0]}?" if near else f"see the fields of {cls.__name__}")  # fmt: skip
        values[name] = _typed(key, value, hints[name])
    return cls(**{**(defaults or {}), **own, **values})


def _mend(name: str) -> str:
    """Which setting of ours stands for Megatron's field."""
    ours = [key for key in known_keys() if key in {f"{section}.{name}" for section in _SECTIONS}]
    key = _OURS.get(name) or (ours[0] if ours else None)
    return f"use {key}" if key else "leave it out: it follows from the model or from how this program trains"


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as one of the types of the field's annotation."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        found = _as(value, option)
        if found is not _NO:
            return found
    raise UserError(f"{key} is {value!r}", f"Megatron's type is {_spelling(options)}")


_NO = object()  # the value is not of that type; None may be one


def _as(value: Any, option: Any) -> Any:
    if option is type(None):
        return None if value is None else _NO
    if typing.get_origin(option) is typing.Literal:
        return value if value in typing.get_args(option) else _NO
    if option is torch.dtype:
        return DTYPES.get(value, _NO) if isinstance(value, str) else _NO
    if isinstance(option, type) and issubclass(option, Enum):
        return option[value] if isinstance(value, str) and value in option.__members__ else _NO
    if option is float:
        return float(value) if type(value) in (int, float) else _NO
    container = typing.get_origin(option) or option
    if container in (list, tuple):
        return container(value) if isinstance(value, list) else _NO
    return value if option in (bool, int, str) and type(value) is option else _NO


def _spelling(options: tuple) -> str:
    return " or ".join(map(_name, options))


def _name(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    return "null" if option is type(None) else getattr(option, "__name__", str(option))

"""Settings under Megatron's names that contradict each other or are of no use without another. What depends on the model, on the
machine or on Megatron-Core's version is refused by policy.check."""

from megatron_nft.config.settings import Config
from megatron_nft.errors import UserError


def check(config: Config) -> None:
    """Raise UserError for settings that do not go together."""
    _check_recompute(config)
    _check_precision(config)
    _check_optimizer(config)


def _check_recompute(config: Config) -> None:
    train = config.train
    owners = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}
    for key, owner in owners.items():
        if getattr(train, key) is not None and train.recompute_granularity != owner:
            raise UserError(
                f"train.{key} is set and train.recompute_granularity {train.recompute_granularity or 'null'}",
                f"set recompute_granularity={owner}, or leave {key} out",
            )
    if train.recompute_modules is not None:
        _check_modules(train.recompute_modules)


def _check_modules(modules: list[str]) -> None:
    known = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
    if not modules or not set(modules) <= set(known):
        raise UserError(f"train.recompute_modules is {modules}", f"use one or more of {', '.join(known)}")


def _check_precision(config: Config) -> None:
    """FP8 stands on bf16; its sub-settings are of no use without it."""
    model = config.model
    if model.fp8 is None:
        for key in ("fp8_param_gather", "first_last_layers_bf16"):
            if getattr(model, key):
                raise UserError(f"model.{key} is on and model.fp8 null", f"set model.fp8=hybrid, or {key}=false")
    elif model.precision not in ("auto", "bf16"):
        raise UserError(f"model.fp8 is {model.fp8} and model.precision {model.precision}", "use precision=bf16: what is not FP8 is bf16")
    if model.first_last_layers_bf16 and model.fp8_recipe == "delayed":
        raise UserError("model.first_last_layers_bf16 is on and model.fp8_recipe delayed", "use tensorwise: Megatron has not both")


def _check_optimizer(config: Config) -> None:
    optimizer, parallel = config.optimizer, config.parallel
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        raise UserError(
            "parallel.overlap_param_gather is on and overlap_grad_reduce off", "turn both on; Megatron has not one without the other"
        )
    if optimizer.optimizer_offload_fraction != 1.0 and not optimizer.optimizer_cpu_offload:
        raise UserError("optimizer.optimizer_offload_fraction is set and optimizer_cpu_offload false", "turn it on, or leave the share out")
    for key in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer, key) != "fp32" and not optimizer.use_precision_aware_optimizer:
            raise UserError(
                f"optimizer.{key} is {getattr(optimizer, key)} and optimizer.use_precision_aware_optimizer false",
                "set use_precision_aware_optimizer=true, or leave it at fp32",
            )
    if optimizer.use_precision_aware_optimizer and config.model.precision == "fp32":
        raise UserError("optimizer.use_precision_aware_optimizer is on and model.precision fp32", "use bf16 or fp16")
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        raise UserError(
            f"optimizer.min_loss_scale ({optimizer.min_loss_scale:g}) is above initial_loss_scale ({optimizer.initial_loss_scale:g})",
            "lower it",
        )

"""Megatron's DDP and distributed optimizer around the model, and the learning-rate schedule."""

from megatron_nft.config import Config
from megatron_nft.policy import moments, settings, versions

FOREVER = 10**9  # updates; the schedule is constant after the warm-up


def wrap(model, config: Config):
    """DistributedDataParallel around the model; gradients are reduced by sum (model.config.calculate_per_token_loss)."""
    from megatron.core.distributed import DistributedDataParallel

    return DistributedDataParallel(model.config, ddp_config(config), model)


def ddp_config(config: Config):
    """Megatron's DistributedDataParallelConfig. Gradients are float32 unless main_grads_dtype is another."""
    from megatron.core.distributed import DistributedDataParallelConfig

    defaults = {
        "grad_reduce_in_fp32": config.optimizer.main_grads_dtype == "fp32",
        # with a dynamic loss scale a gradient that is not finite is an overflow, which the optimizer skips
        "check_for_nan_in_grad": settings.precision_of(config.model.precision) != "fp16",
    }
    return settings.complete("ddp", DistributedDataParallelConfig, settings.ddp(config), config, defaults)


def optimizer_config(config: Config):
    """Megatron's OptimizerConfig."""
    from megatron.core.optimizer import OptimizerConfig

    return settings.complete("optimizer", OptimizerConfig, settings.optimizer(config), config)


def make(chunks: list, config: Config):
    """(optimizer, scheduler) of the model's DDP chunks. Weight decay applies to every parameter, as in the published runs."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    versions.provide_adam()
    megatron, own = optimizer_config(config), config.optimizer
    optimizer = get_megatron_optimizer(megatron, chunks, config_overrides={})
    for one in optimizer.chained_optimizers:
        moments.gather_in_place(one)
    for one in optimizer.chained_optimizers:  # moments from the start: a run may have to be saved before its first update
        if one.init_state_fn is None:  # kept on the host: Megatron makes it at the first update, or when a checkpoint is loaded
            continue
        one.init_state_fn(one.optimizer, megatron)
        for group in one.optimizer.param_groups:
            group.setdefault("step", 0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=own.lr,
        min_lr=0.0,
        lr_warmup_steps=own.lr_warmup_iters,
        lr_decay_steps=FOREVER,
        lr_decay_style="constant",
        start_wd=own.weight_decay,
        end_wd=own.weight_decay,
        wd_incr_steps=FOREVER,
        wd_incr_style="constant",
        # on resume the settings are the config's, the count of steps the checkpoint's
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def load(optimizer, state: dict) -> None:
    """Take moments and step counts from a checkpoint's state. Learning rate, betas and so on stay those of the config."""
    kept = [{name: value for name, value in group.items() if name not in ("params", "step")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)

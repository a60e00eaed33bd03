"""Megatron's DDP and distributed optimizer around the model, and the learning-rate schedule."""

import torch

from megatron_nft.config import OptimizerConfig

FOREVER = 10**9  # updates; the schedule is constant after the warm-up


def wrap(model, megatron_config, overlap: bool | None = None):
    """DistributedDataParallel with float32 gradients, reduced by sum (megatron_config.calculate_per_token_loss).

    overlap: reduce gradients while the last micro-batch still runs; by default where there is CUDA.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=torch.cuda.is_available() if overlap is None else overlap,
        overlap_param_gather=False,
        check_for_nan_in_grad=True,
    )
    return DistributedDataParallel(megatron_config, ddp, model)


def make(chunks: list, settings: OptimizerConfig):
    """(optimizer, scheduler) of the model's DDP chunks. Weight decay applies to every parameter, as in the published runs."""
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    dtype = chunks[0].config.params_dtype
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, chunks, config_overrides={})
    for one in optimizer.chained_optimizers:  # moments from the start: a run may have to be saved before its first update
        one.init_state_fn(one.optimizer, config)
        for group in one.optimizer.param_groups:
            group.setdefault("step", 0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=0.0,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=FOREVER,
        lr_decay_style="constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=FOREVER,
        wd_incr_style="constant",
        # on resume the settings are the config's, the count of steps the checkpoint's
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def load(optimizer, state: dict) -> None:
    """Take moments and step counts from a checkpoint's state. Learning rate, betas and so on stay those of the config."""
    settings = [{name: value for name, value in group.items() if name not in ("params", "step")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)

"""What is refused before a model is built: settings against the model, the machine, the layout, and Megatron-Core's own rules."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_nft.config import Config
from megatron_nft.errors import UserError, needs_gpu
from megatron_nft.policy import deterministic, machine, model, optimizer, settings, versions
from megatron_nft.sizes import expert_tensor_size
from megatron_nft.weights import load_weights, table_for


def check(config: Config, window: int, training: bool = True) -> None:
    """Raise UserError for a model that cannot be laid out, is not all there, or that this code would compute wrongly, and for settings
    of training (unless `training` is false) that do not fit it, the machine or each other.

    Nothing is allocated. window: tokens of the longest prompt with its answer.
    """
    machine.check()
    model.check(config, window)
    if not training:
        return
    check_chip(config)
    versions.prepare()
    versions.check_transformer_engine()
    hf = load_weights(config.model.path).config
    _check_fp8(hf, config)
    _check_optimizer(config)
    _check_recompute(hf, config)
    deterministic.check(config)
    with _refusals_reported():
        transformer = model.transformer_config(hf, config)
        optimizer.ddp_config(config)
        optimizer.optimizer_config(config)
        versions.check_fp8_recipe(transformer)
    engine = model.by_transformer_engine(transformer.params_dtype)
    if transformer.gradient_accumulation_fusion and not versions.have_fused_accumulation(engine):
        raise UserError(
            "megatron.transformer.gradient_accumulation_fusion is on, but the layers are not Transformer Engine's, and Apex, which has the "
            "kernel for others, is not installed",
            "leave it out",
        )


def check_chip(config: Config) -> None:
    """Raise UserError for FP8 training that the GPU at hand does not have. Neither Megatron-Core nor Transformer Engine is imported."""
    if config.model.fp8 is None:
        return
    if not torch.cuda.is_available():
        return needs_gpu(f"model.fp8 is {config.model.fp8}, but there is no GPU", "set model.fp8=null, or run where there is one")
    machine.check_fp8(config.model.fp8_recipe)


def _check_fp8(hf: dict, config: Config) -> None:
    """FP8 multiplications have sides that divide by 16 (32 for mxfp8), on every rank."""
    if config.model.fp8 is None or not torch.cuda.is_available():
        return
    if not versions.have_transformer_engine():
        raise UserError(f"model.fp8 is {config.model.fp8}, but Transformer Engine is not installed", "install it, or set model.fp8=null")
    if refused := versions.fp8_refused(config.model.fp8_recipe):
        raise UserError(f"Transformer Engine refuses model.fp8_recipe {config.model.fp8_recipe} ({refused})", "use another recipe")
    if settings.precision_of(config.model.precision) != "bf16":
        raise UserError(f"model.fp8 is {config.model.fp8} and the precision is not bf16", "set model.precision=bf16")
    side = versions.fp8_side(config.model.fp8_recipe)
    for name, size in _fp8_sizes(hf, config).items():
        if size % side:
            raise UserError(f"{name} is {size}, which model.fp8_recipe {config.model.fp8_recipe} asks to be a multiple of {side}",
                            "change it, the layout or the recipe, or set model.fp8=null")  # fmt: skip


def _fp8_sizes(hf: dict, config: Config) -> dict[str, float]:
    """Rows and columns of the linear layers' operands on a rank, by what the user knows them as. A fraction divides by nothing."""
    parallel, sizes = config.parallel, table_for(hf).sizes
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    cut = cp * (tp if parallel.sequence_parallel else 1)
    return {
        "the model's hidden size": sizes.hidden,
        "the model's intermediate size on a tensor-parallel rank": sizes.ffn / tp,
        "the width of a tensor-parallel rank's attention heads": sizes.heads * sizes.head / tp,
        "the width of a tensor-parallel rank's queries, keys and values": (sizes.heads + 2 * sizes.groups) * sizes.head / tp,
        **({"the experts' intermediate size on a rank": sizes.expert_ffn / expert_tensor_size(parallel)} if sizes.experts else {}),
        "train.tokens_per_micro_batch on a rank": config.train.tokens_per_micro_batch / cut,
    }


def _check_optimizer(config: Config) -> None:
    if config.optimizer.optimizer_cpu_offload and not torch.cuda.is_available():
        needs_gpu("optimizer.optimizer_cpu_offload is on, but there is no GPU to offload from", "set it to false")
    if config.optimizer.use_precision_aware_optimizer and not versions.have_transformer_engine():
        raise UserError(
            "optimizer.use_precision_aware_optimizer is on, but Transformer Engine, whose FusedAdam it needs, is not in use",
            "set it to false",
        )


def _check_recompute(hf: dict, config: Config) -> None:
    """The checkpoint that drops its own output is written with Transformer Engine's names (0.16 and 0.19: NameError without)."""
    modules = set(config.train.recompute_modules or ())
    if experts := modules & {"moe", "moe_act", "shared_experts"} if not table_for(hf).sizes.experts else modules & {"shared_experts"}:
        raise UserError(f"train.recompute_modules has {min(experts)}, which the model has not", "leave it out")
    for name in {"layernorm", "moe_act"} & modules:
        if not versions.have_transformer_engine():
            raise UserError(
                f"train.recompute_modules has {name}, but Transformer Engine is not in use", "leave it out; core_attn and mlp remain"
            )


@contextmanager
def _refusals_reported() -> Iterator[None]:
    """Megatron-Core's rules between its settings are in its config classes, which raise what Python has."""
    try:
        yield
    except (ValueError, AssertionError, RuntimeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].line  # an assertion may say no more
        raise UserError(f"Megatron-Core {versions.version()} refuses these settings: {error or where}", "change what it names") from error

"""Whether a model fits a layout, and a layout its ranks, from config.json and the settings alone: said before anything is allocated."""

from math import lcm, prod

from megatron_nft.config import Config, ParallelConfig
from megatron_nft.errors import UserError
from megatron_nft.weights import table_for


def check_layout(hf: dict, config: Config) -> None:
    """Raise UserError for sizes of the model, or of its micro-batches, that cannot be cut as config.parallel says."""
    parallel = config.parallel
    _check_sizes(hf, parallel)
    _check_experts(hf, parallel)
    _check_slots(parallel, config.train.tokens_per_micro_batch)
    _check_recompute(hf, config)


def check_ranks(parallel: ParallelConfig, world: int) -> None:
    """Raise UserError for sizes that cannot be laid out over `world` ranks."""
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    names = "tensor_model_parallel_size x pipeline_model_parallel_size" + " x context_parallel_size" * (cp > 1)
    _check_world(world, [tp, pp, *([cp] if cp > 1 else [])], names)
    if parallel.sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel is on with tensor_model_parallel_size 1", "turn it off, or use TP 2 or more")
    if parallel.virtual_pipeline_model_parallel_size is not None and pp == 1:
        raise UserError(
            "parallel.virtual_pipeline_model_parallel_size is set with pipeline_model_parallel_size 1", "leave it out, or use PP 2 or more"
        )
    ep, etp = parallel.expert_model_parallel_size, expert_tensor_size(parallel)
    if ep > 1:
        _check_world(world, [etp, ep, pp], "expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size")
    elif etp != tp:  # Megatron then counts each rank's experts as tensor-parallel slices
        raise UserError(
            f"parallel.expert_tensor_parallel_size is {etp} with tensor_model_parallel_size {tp} and expert_model_parallel_size 1",
            "leave it out, or use EP 2 or more",
        )


def _check_world(world: int, sizes: list[int], names: str) -> None:
    if world % (model := prod(sizes)):
        raise UserError(
            f"world size {world} is not divisible by {names} ({' x '.join(map(str, sizes))})",
            f"start a multiple of {model} ranks (torchrun --nproc-per-node) or change parallel.*",
        )


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Ranks an expert is cut over, Megatron's default included."""
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def virtual_size(parallel: ParallelConfig) -> int | None:
    """Chunks of a pipeline stage as Megatron takes it: None where the schedule is not interleaved."""
    chunks = parallel.virtual_pipeline_model_parallel_size
    return None if chunks == 1 else chunks


def _check_sizes(hf: dict, parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = virtual_size(parallel)
    layers = "pipeline_model_parallel_size" + " x virtual_pipeline_model_parallel_size" * (chunks is not None)
    for name, size, by, setting in (
        ("attention heads", hf["num_attention_heads"], tp, "tensor_model_parallel_size"),
        ("key-value heads", hf.get("num_key_value_heads") or hf["num_attention_heads"], tp, "tensor_model_parallel_size"),
        ("intermediate size", hf["intermediate_size"], tp, "tensor_model_parallel_size"),
        ("layers", hf["num_hidden_layers"], pp * (chunks or 1), layers),
    ):
        if size % by:
            raise UserError(f"{name} ({size}) cannot be divided by parallel.{setting} ({by})", f"use one of {_divisors(size)}")


def _check_recompute(hf: dict, config: Config) -> None:
    """Megatron recomputes `uniform` runs of layers of one length; it finds out in the middle of a step where the last is shorter."""
    train, parallel = config.train, config.parallel
    layers = hf["num_hidden_layers"] // parallel.pipeline_model_parallel_size // (virtual_size(parallel) or 1)
    if train.recompute_method != "block" and train.recompute_num_layers and layers % train.recompute_num_layers:
        raise UserError(
            f"train.recompute_num_layers ({train.recompute_num_layers}) does not divide the {layers} layers of a pipeline stage's chunk",
            f"use one of {_divisors(layers)}, or recompute_method=block",
        )


def _check_experts(hf: dict, parallel: ParallelConfig) -> None:
    ep, etp = parallel.expert_model_parallel_size, expert_tensor_size(parallel)
    table = table_for(hf)
    if not table.sizes.experts:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if (getattr(parallel, name) or 1) > 1:
                raise UserError(f"parallel.{name} is {getattr(parallel, name)}, and the model has no experts", "leave it out")
        return
    table.check_expert_parallel(ep, etp)
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            "the model has experts, and parallel.tensor_model_parallel_size is more than 1 without sequence_parallel",
            "set parallel.sequence_parallel=true: Megatron trains mixtures of experts no other way",
        )


def _check_slots(parallel: ParallelConfig, tokens: int) -> None:
    """Every rank takes an equal part of a micro-batch: two slices of each sequence, and of that its part of the sequence."""
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    multiple = lcm(2 * cp if cp > 1 else 1, cp * tp if parallel.sequence_parallel else 1)
    if tokens % multiple:
        why = [f"2 x context_parallel_size ({cp})"] * (cp > 1)
        product = f"context_parallel_size x tensor_model_parallel_size ({cp} x {tp})" if cp > 1 else f"tensor_model_parallel_size ({tp})"
        why += [f"{product} with sequence_parallel"] * parallel.sequence_parallel
        raise UserError(
            f"train.tokens_per_micro_batch ({tokens}) cannot be divided by {' and '.join(why)}",
            f"use a multiple of {multiple}, e.g. {-(-tokens // multiple) * multiple}",
        )


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0 and d <= 64]

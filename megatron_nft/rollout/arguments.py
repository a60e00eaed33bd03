"""What vLLM is started with: one dictionary for an engine in this process and for a server, and what it refuses."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from megatron_nft.config import RolloutConfig
from megatron_nft.errors import UserError, first_line, needs_gpu
from megatron_nft.rollout import installed
from megatron_nft.rollout.settings import set_environment
from megatron_nft.weights import is_checkpoint

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PLAIN_CACHES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")  # kv_cache_dtypes of all versions: no need to ask vLLM


def engine_arguments(rollout: RolloutConfig, model_path: str, max_model_len: int, precision: str, seed: int) -> dict[str, Any]:
    """Fields of vLLM's EngineArgs with their values, which JSON can hold, of any engine that samples for training: as keyword arguments
    of an engine in this process, or with `command_line` as those of a server.

    max_model_len is in tokens, prompt and answer together; precision is "fp32", "bf16" or "fp16".
    """
    return {
        "model": model_path,
        "dtype": DTYPES[precision],
        "hf_overrides": {"head_dtype": "float32"},  # logits in float32, as the trainer's are
        "seed": seed,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "logprobs_mode": "processed_logprobs",  # of what was sampled: after temperature and top_p
        "load_format": "dummy" if is_checkpoint(model_path) else "auto",  # vLLM cannot read a checkpoint
        "kv_cache_dtype": rollout.kv_cache_dtype,
        **_given(rollout, "enable_prefix_caching", "quantization"),
        **(_gpu_arguments(rollout) if torch.cuda.is_available() else _cpu_arguments(rollout, max_model_len)),
        **({"speculative_config": _with_weights(rollout.speculative_config)} if rollout.speculative_config else {}),
        **rollout.vllm,
    }


def _gpu_arguments(rollout: RolloutConfig) -> dict[str, Any]:
    graphs = {"compilation_config": {"cudagraph_mode": rollout.cudagraph_mode}} if rollout.cudagraph_mode else {}
    return {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "enforce_eager": rollout.enforce_eager,
        **_given(rollout, "enable_chunked_prefill"),
        **graphs,
    }


def _cpu_arguments(rollout: RolloutConfig, max_model_len: int) -> dict[str, Any]:
    """On the CPU a prompt must never be split: a CPU generator cannot be set back by an offset, as vLLM does for a seeded one."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(rollout.max_num_batched_tokens, max_model_len),
        "enforce_eager": True,  # compiling costs more than it gains for the models a CPU can train
    }


def _given(rollout: RolloutConfig, *names: str) -> dict[str, Any]:
    """Those that are set: what is None is vLLM's own choice."""
    return {name: value for name in names if (value := getattr(rollout, name)) is not None}


def _with_weights(speculative: dict[str, Any]) -> dict[str, Any]:
    """A draft model's weights are read from its directory, however the model's own arrive."""
    return {"draft_load_config": {"load_format": "auto"}, **speculative} if has_draft_model(speculative) else dict(speculative)


def has_draft_model(speculative: dict[str, Any]) -> bool:
    """Whether the drafts come from a model with weights of its own, which no sync renews."""
    return bool(speculative.get("model")) and not str(speculative.get("method")).startswith("ngram")


def command_line(arguments: dict[str, Any]) -> list[str]:
    """engine_arguments as the flags of vLLM's server: --max-model-len 4096 --no-enable-chunked-prefill --hf-overrides '{...}'."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return words


def check(rollout: RolloutConfig) -> None:
    """Raise UserError for what this machine or this vLLM cannot do. vLLM is imported where there is a GPU, and without one only where a
    setting needs to be looked up in it."""
    installed.check(rollout)
    if torch.cuda.is_available():
        _check_fp8(rollout)
    else:
        _check_cpu(rollout)
    if rollout.vllm or rollout.kv_cache_dtype not in PLAIN_CACHES:
        _check_names(rollout)
    if rollout.speculative_config:
        _check_speculation(rollout)


def _check_cpu(rollout: RolloutConfig) -> None:
    for key, why in {
        "quantization": "vLLM quantises weights as they arrive on GPUs alone",
        "enable_chunked_prefill": "a prompt in pieces and a seed do not go together without a GPU",
        "cudagraph_mode": "there is no GPU",
    }.items():
        if value := getattr(rollout, key):
            needs_gpu(f"rollout.{key} is {value}, and {why}", "leave it out")
    if rollout.kv_cache_dtype.startswith("fp8") and not torch.cpu._is_avx512_supported():
        needs_gpu(f"rollout.kv_cache_dtype is {rollout.kv_cache_dtype}, and this CPU has no AVX-512, which vLLM needs", "use auto")


def _check_fp8(rollout: RolloutConfig) -> None:
    """By vLLM's own least capability of a quantisation (FP8 weights go from 7.5 on: kernels for older chips widen them), and by what its
    attention kernels have: FlashAttention 3's and Triton's read an FP8 cache from 8.9 on, FlashInfer's from 8.0 on."""
    chip = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))
    number = 10 * chip[0] + chip[1]
    if rollout.quantization and (least := _least_capability(rollout.quantization)) > number:
        raise UserError(
            f"rollout.quantization is {rollout.quantization}, which vLLM has from compute capability {least / 10} on; this GPU's is "
            f"{number / 10}",
            "leave it out",
        )
    if rollout.kv_cache_dtype.startswith("fp8") and number < (80 if importlib.util.find_spec("flashinfer") else 89):
        raise UserError(
            f"rollout.kv_cache_dtype is {rollout.kv_cache_dtype}, and vLLM's attention reads an FP8 cache from compute capability 8.9 on "
            f"(FlashInfer's from 8.0 on); this GPU's is {number / 10}",
            "use auto",
        )


def _least_capability(quantization: str) -> int:
    from vllm.model_executor.layers.quantization import get_quantization_config

    try:
        return get_quantization_config(quantization).get_min_capability()
    except ValueError as error:
        raise UserError(f"rollout.quantization is {quantization}: {first_line(error)}", "mend the name, or leave it out") from error


def _check_names(rollout: RolloutConfig) -> None:
    set_environment(rollout)
    import vllm
    from vllm.config.cache import CacheDType
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in rollout.vllm:
        if name not in known:
            raise UserError(f"rollout.vllm.{name} is no field of vLLM {vllm.__version__}'s EngineArgs", "mend the name, or leave it out")
    if rollout.kv_cache_dtype not in get_args(CacheDType):
        raise UserError(
            f"rollout.kv_cache_dtype is {rollout.kv_cache_dtype!r}", f"vLLM {vllm.__version__} has {', '.join(get_args(CacheDType))}"
        )


def _check_speculation(rollout: RolloutConfig) -> None:
    """Names alone: what the values have to be depends on the method, and vLLM says so when it starts."""
    set_environment(rollout)
    import vllm
    from vllm.config.speculative import SpeculativeConfig

    known = {field.name for field in dataclasses.fields(SpeculativeConfig)}
    for name in rollout.speculative_config:
        if name not in known:
            raise UserError(
                f"rollout.speculative_config.{name} is no field of vLLM {vllm.__version__}'s SpeculativeConfig",
                "mend the name, or leave it out",
            )
    if has_draft_model(rollout.speculative_config) and not Path(str(rollout.speculative_config["model"])).is_dir():
        raise UserError(
            f"rollout.speculative_config.model: no directory at {rollout.speculative_config['model']}", "give the draft model's directory"
        )


@contextmanager
def refusals_told() -> Iterator[None]:
    """What vLLM's own validation refuses among its arguments comes as a UserError: these are values that the settings gave."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = " ".join(first["msg"].split())
        raise UserError(
            f"vLLM refuses its {error.title}{f' ({where})' if where else ''}: {said}",
            "mend rollout.speculative_config, rollout.vllm, or the setting of that name",
        ) from error

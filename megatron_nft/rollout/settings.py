"""What vLLM has to be told: its environment, its arguments, the parameters of a request; and what it must leave alone."""

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from megatron_nft.config import RolloutConfig


@dataclass(frozen=True)
class Request:
    """One answer to be sampled. Temperature 0 is greedy; the seed makes the answer the same in any batch and on any engine."""

    token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()  # strings that end it; it keeps them


def sampling(request: Request) -> dict[str, Any]:
    """vLLM's sampling parameters of a request, as JSON can hold them."""
    params = {"temperature": request.temperature, "top_p": request.top_p, "max_tokens": request.max_tokens, "logprobs": 0}
    if request.temperature:
        params["seed"] = request.seed
    if request.stop:
        return params | {"stop": list(request.stop), "include_stop_str_in_output": True}
    return params | {"detokenize": False}  # the text is decoded once, at the end


def sampling_params(request: Request) -> Any:
    """The same for an engine in this process."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**sampling(request), flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)


def set_environment(rollout: RolloutConfig) -> None:
    """vLLM reads these when it is first imported. What the user has set stays, save the one thing the layout rests on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    for name, value in (
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_CPU_KVCACHE_SPACE", str(rollout.cpu_kvcache_space)),
        # On the CPU its warnings are a page about kernels and libraries that are missing there by design.
        ("VLLM_LOGGING_LEVEL", "WARNING" if torch.cuda.is_available() else "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("DO_NOT_TRACK", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)  # "Triton doesn't include CPU backend", by design
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)  # raised by vLLM's import


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the process's random generators as they were: vLLM seeds them all when it starts, and draws from torch's for greedy answers
    (which do not depend on it). They are part of a training checkpoint."""
    python, of_numpy, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def name_shared_memory(token: str) -> None:
    """Let vLLM's tensor-parallel ranks on the CPU name their shared memory by `token`, the same on every rank and new at each start.

    Under the external launcher the name holds nothing but ranks, so that what a killed run left there (or another run on the machine) ends
    the next start with "create shm ... failed. errno: 17".
    """
    from vllm.distributed.device_communicators import cpu_communicator

    shared = cpu_communicator._CPUSHMDistributed
    named = shared.make_group_name
    shared.make_group_name = staticmethod(lambda communicator: f"{named(communicator)}-{token}")


def mend_expansion() -> None:
    """Give vLLM 0.32 on the CPU a function for numbers of answers as numbers of their drafted tokens: its own turns them into integers on
    the way, and leaves a temperature or top_p what the memory held before."""
    from vllm.utils import cpu_triton_utils

    def expand(output: torch.Tensor, numbers: torch.Tensor, ends: torch.Tensor, replace_from, replace_to, *_, **__) -> None:
        numbers = torch.where(numbers == replace_from, torch.full_like(numbers, replace_to), numbers)
        output.copy_(numbers.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1))))

    cpu_triton_utils._expand_kernel_impl = expand  # before an engine starts, which takes the functions from there


def tame(engine: Any) -> None:
    """Take from a started vLLM engine what does not fit a process that is not its own."""
    # When its engine core is collected, 0.32 ends torch.distributed, which belongs to the caller (0.26 has no such finalizer).
    finalizer = getattr(engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
    # A reload reports every rotary embedding, which has no weights, as not loaded; sync() checks the names itself.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


def leave_alone(worker: Any) -> None:
    """Tell what a worker runs that its engine is the only one: 0.26's second model runner, and drafts of every version, keep the number of
    engines that they were started with, and go on to wait for the others in each step."""
    runner = worker.model_runner
    for one in (runner, getattr(runner, "speculator", None)):
        if "dp_size" in getattr(one, "__dict__", {}):
            one.dp_size = 1


def repack_head(model: torch.nn.Module) -> None:
    """Repack a tied head after a reload: vLLM's CPU kernels keep a packed copy of it, and a reload renews only the embedding's own."""
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def repack_experts(model: torch.nn.Module) -> None:
    """Repack experts after a reload: vLLM 0.32's CPU kernels want them packed, its start packs them, and its reload does not."""
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def rounds_head(model: torch.nn.Module) -> bool:
    """Whether a started model rounds its logits to 16 bits. The trainer never does: its logits are float32 products.

    vLLM takes `head_dtype` from the model's config where its version knows it for a generating model (0.32 does), and leaves it unread
    elsewhere.
    """
    head = getattr(model.logits_processor, "head_dtype", None) or model.lm_head.weight.dtype
    return head != torch.float32

"""Megatron-Core on a machine without a GPU: "cuda" means "cpu".

Megatron-Core names CUDA in tensor factories (`device="cuda"`), in `Tensor.cuda()`, in `Tensor.type()` comparisons and in a
handful of torch.cuda functions. Nothing else in the code paths used here needs a GPU, so those names are all this module
redirects. It is applied once, before the first Megatron object is made, and only where torch sees no CUDA device.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites a CUDA device argument to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


_CPU = torch.device("cpu")
_mode: _CudaMeansCpu | None = None


def _is_cuda(device) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def adapt() -> None:
    """Redirect CUDA to the CPU for the whole process; a second call, or a machine with CUDA, changes nothing."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: _Stream()
    torch.cuda.stream = lambda stream: nullcontext()
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    _redirect_megatron()
    _redirect_experts()
    _mode = _CudaMeansCpu()
    _mode.__enter__()


def adapted() -> AbstractContextManager:
    """The redirection for another thread than the one that called adapt(): torch keeps it by the thread."""
    return _CudaMeansCpu() if _mode is not None else nullcontext()


def plain() -> AbstractContextManager:
    """No redirection, where none is needed: it costs a call of Python for every operation and attribute of a tensor."""
    return torch._C.DisableTorchFunction() if _mode is not None else nullcontext()


class _Stream:
    """Stands in for a CUDA stream where everything is in order anyway."""

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> "_Stream":
        """An event is done when it is recorded."""
        return self


def _redirect_megatron() -> None:
    """Point Megatron's RNG helpers at the CPU generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _redirect_experts() -> None:
    """Let the token dispatcher do without streams, and gloo with parts of unequal size, which experts get."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _Stream()
    for name, stand_in in (("all_to_all_single", _all_to_all_single), ("all_gather", _all_gather), ("reduce_scatter", _reduce_scatter)):
        setattr(torch.distributed, name, partial(stand_in, getattr(torch.distributed, name)))


def _all_to_all_single(original, output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
    """gloo takes lists of split sizes; without a GPU to fetch them from, Megatron leaves them tensors."""
    sizes = (split.tolist() if torch.is_tensor(split) else split for split in (output_split_sizes, input_split_sizes))
    return original(output, input, *sizes, **kwargs)


def _all_gather(original, tensor_list, tensor, group=None, async_op=False):
    """gloo's parts are of one size: padded to the longest."""
    lengths = [len(t) for t in tensor_list] if tensor.ndim else []
    if len(set(lengths)) < 2:
        return original(tensor_list, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in tensor_list]
    original(gathered, padded, group=group)
    for own, part in zip(tensor_list, gathered):
        own.copy_(part[: len(own)])


def _reduce_scatter(original, output, input_list, *args, group=None, **kwargs):
    """gloo's parts are of one size: summed whole, and the own part taken."""
    if len({len(t) for t in input_list}) < 2:
        return original(output, input_list, *args, group=group, **kwargs)
    whole = torch.cat(list(input_list))
    torch.distributed.all_reduce(whole, group=group)
    output.copy_(whole.split([len(t) for t in input_list])[torch.distributed.get_rank(group)])

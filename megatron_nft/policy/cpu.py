"""Megatron-Core on a machine without a GPU: "cuda" means "cpu".

Megatron-Core names CUDA in tensor factories (`device="cuda"`), in `Tensor.cuda()`, in `Tensor.type()` comparisons and in a
handful of torch.cuda functions. Nothing else in the code paths used here needs a GPU, so those names are all this module
redirects. It is applied once, before the first Megatron object is made, and only where torch sees no CUDA device.
"""

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
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    _redirect_megatron()
    _mode = _CudaMeansCpu()
    _mode.__enter__()


class _Stream:
    """Stands in for a CUDA stream where everything is in order anyway."""

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass


def _redirect_megatron() -> None:
    """Point Megatron's RNG helpers at the CPU generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

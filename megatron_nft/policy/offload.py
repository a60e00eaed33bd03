"""The trainer's memory between updates: kept on the host, or given up, while vLLM generates, and brought back bit for bit."""

from collections.abc import Iterable, Iterator

import torch

from megatron_nft.policy.topology import device

LEVELS = {  # train.offload: what leaves the device
    "none": (),
    "gradients": ("gradients",),
    "optimizer": ("gradients", "optimizer"),
    "all": ("gradients", "optimizer", "parameters"),
}


class Offload:
    """Empties the storages behind parameters, gradients and optimizer state, and fills them again.

    Tensors stay what they are, views included: only the memory behind them goes. Gradient buffers hold nothing between updates, so
    they are freed and come back as zeros. Host copies are pinned and kept for the next time.
    """

    def __init__(self, chunks: list, optimizer):
        """chunks: Megatron's DistributedDataParallel modules. optimizer: theirs, or None."""
        self._chunks, self._optimizer = chunks, optimizer
        self._host: dict[tuple[str, int], torch.Tensor] = {}  # by kind and the storage's number among its kind
        self._away: dict[str, list[tuple[torch.UntypedStorage, int, torch.Tensor | None]]] = {}

    def leave(self, kinds: Iterable[str]) -> None:
        """Move the kinds (gradients, optimizer, parameters) that are still on the device off it."""
        for kind in kinds:
            if kind not in self._away:
                self._away[kind] = [self._empty(kind, *numbered) for numbered in enumerate(self._storages(kind))]
        if self._away:
            self._drop_fp8_copies()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # torch's cache is of no use to vLLM

    def _drop_fp8_copies(self) -> None:
        """Transformer Engine keeps each weight in FP8 from a pass's first micro-batch to its last, and makes it anew in the next one."""
        for module in (module for chunk in self._chunks for module in chunk.modules()):
            getattr(module, "_fp8_workspaces", {}).clear()

    def come_back(self, kinds: Iterable[str] = ("gradients", "optimizer", "parameters")) -> None:
        """Bring back what is off the device of these kinds; nothing where nothing is."""
        for storage, size, host in (entry for kind in kinds for entry in self._away.pop(kind, ())):
            storage.resize_(size)
            _bytes_of(storage).zero_() if host is None else _bytes_of(storage).copy_(host, non_blocking=True)

    def _empty(self, kind: str, number: int, storage: torch.UntypedStorage) -> tuple:
        size, host = storage.nbytes(), None
        if kind != "gradients":
            host = self._host.get((kind, number))
            if host is None or host.nbytes != size:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
                self._host[kind, number] = host
            host.copy_(_bytes_of(storage))  # waits for the device: the memory goes in the next line
        storage.resize_(0)
        return storage, size, host

    def _storages(self, kind: str) -> Iterator[torch.UntypedStorage]:
        """The storages of a kind on this rank's device, each once. What is of several kinds (a buffer that gradients and gathered
        parameters share; float32 parameters, which the optimizer steps in place) belongs to the first of them."""
        seen: set[int] = set()
        for walked, tensors in (("gradients", self._gradients()), ("parameters", self._parameters()), ("optimizer", self._state())):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if tensor.device.type == device().type and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    if walked == kind and storage.nbytes():
                        yield storage

    def _buffers(self) -> list:
        return [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _gradients(self) -> Iterator[torch.Tensor]:
        return (buffer.grad_data for buffer in self._buffers())

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (buffer.param_data for buffer in self._buffers() if buffer.param_data is not None)

    def _state(self) -> Iterator[torch.Tensor]:
        for one in self._optimizer.chained_optimizers if self._optimizer else ():
            for group in one.optimizer.param_groups:
                yield from group["params"]  # the float32 copies
            for state in one.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value) and value.numel() > 1)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

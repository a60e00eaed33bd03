"""Flat buffers of whole Hugging Face tensors: what the stream hands over."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: a slice of a buffer can be viewed as any dtype


@cache
def room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in a buffer."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def view(buffer: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that lies at a place in a buffer of bytes."""
    return buffer[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor without gaps."""
    return tuple(torch.Size(shape[i + 1 :]).numel() for i in range(len(shape)))


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a buffer."""

    name: str  # Hugging Face's
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes, a multiple of ALIGNMENT


@dataclass(frozen=True)
class Bucket:
    """Whole tensors under their Hugging Face names in one allocation."""

    buffer: Tensor  # uint8 [bytes]
    slots: list[Slot]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view of the buffer)."""
        typed = {dtype: self.buffer.view(dtype) for dtype in {slot.dtype for slot in self.slots}}
        for slot in self.slots:  # one operation a tensor: a model has hundreds, each of microseconds
            whole = typed[slot.dtype]
            start = whole.storage_offset() + slot.offset // slot.dtype.itemsize
            yield slot.name, whole.as_strided(slot.shape, _strides(slot.shape), start)


class Buffers:
    """Memory for one bucket after another. A buffer is lent out again when no tensor uses its memory any more.

    On a GPU this is what torch's allocator does. On the CPU large blocks go back to the system and come again as new pages, each zeroed on
    its first touch: that takes several times as long as filling them, so they are kept here.
    """

    def __init__(self):
        self._blocks: list[tuple[np.ndarray, weakref.ref]] = []  # memory, and what stands for the last tensor made of it

    def empty(self, nbytes: int, largest: int, device: torch.device) -> Tensor:
        """A new tensor, uint8 [nbytes]; `largest` is the most that will be asked for. Blocks that turn out too small are given up."""
        if device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        used = [(block, user) for block, user in self._blocks if user() is not None]
        free = [block for block, user in self._blocks if user() is None and len(block) >= nbytes]
        block, *rest = sorted(free, key=len) or [torch.empty(largest, dtype=torch.uint8).numpy()]
        part = block[:nbytes]  # lives as long as a tensor does that views its memory
        self._blocks = [*used, (block, weakref.ref(part)), *((other, _nobody) for other in rest)]
        return torch.from_numpy(part)


def _nobody() -> None:
    """In place of a reference that is dead."""

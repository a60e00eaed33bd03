"""Megatron's buffers of parameters and gradients, and what each data-parallel rank's optimizer owns of them.

As megatron.core.distributed.param_and_grad_buffer (0.16 to 0.19) lays them out for the distributed optimizer: parameters in the order of
the backward pass, each from a multiple of 64 elements on, in buckets that end at a multiple of 128 and of the ranks. Rank r owns the r-th
equal part of every bucket.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm

import numpy as np

from megatron_nft.planner.parameters import Parameter

START, END, BUS = 64, 128, 2**16  # elements; the last with pad_buckets_for_high_nccl_busbw


@dataclass(frozen=True)
class Buffer:
    """One buffer: of all parameters of a chunk that have the same dtype and are reduced over the same ranks."""

    parameters: tuple[Parameter, ...]  # in the order of the modules
    ranks: int  # that share it: data and context parallel, or expert data parallel
    bucket_size: int | None  # elements from which on a bucket is full; None: one bucket
    itemsize: int  # bytes of an element of the parameters
    gradient_itemsize: int
    high_bandwidth: bool = False

    @cached_property
    def _spans(self) -> tuple[np.ndarray, list[int]]:
        """(starts and ends of the parameters [parameters, 2], last first; ends of the buckets)."""
        divisor = lcm(self.ranks, END, BUS if self.high_bandwidth else END)
        spans, ends, at, filled = [], [], 0, False
        for parameter in reversed(self.parameters):
            start = _up(at, START)
            if parameter.alone and filled:
                start = _up(start, divisor)
                ends.append(start)
            at = start + parameter.numel
            spans.append((start, at))
            full = self.bucket_size is not None and at - (ends[-1] if ends else 0) >= self.bucket_size
            filled = not (full or parameter.alone)
            if not filled:
                at = _up(at, divisor)
                ends.append(at)
        return np.array(spans), ends + [_up(at, divisor)] * filled

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return self._spans[1][-1]

    @property
    def buckets(self) -> list[int]:
        """Elements of each bucket, padding included."""
        return np.diff(self._spans[1], prepend=0).tolist()

    @cached_property
    def owned(self) -> np.ndarray:
        """int [ranks]: elements of parameters, without padding, in each rank's part of all buckets."""
        spans, ends = self._spans
        cuts = np.concatenate([np.linspace(start, end, self.ranks + 1, dtype=np.int64) for start, end in zip([0, *ends], ends)])
        return np.diff(self._before(cuts).reshape(len(ends), self.ranks + 1)).sum(0)

    def pieces(self, rank: int) -> list[int]:
        """Elements of each piece of a parameter that a rank owns, in the order in which its optimizer lists them."""
        spans, ends = self._spans
        found = []
        for start, end in zip([0, *ends], ends):
            part = (end - start) // self.ranks
            low, high = start + rank * part, start + (rank + 1) * part
            sizes = np.minimum(spans[:, 1], high) - np.maximum(spans[:, 0], low)
            found += sizes[sizes > 0].tolist()
        return found

    def _before(self, places: np.ndarray) -> np.ndarray:
        """Elements of parameters before each place."""
        starts, ends = self._spans[0].T
        held = np.concatenate([[0], np.cumsum(ends - starts)])
        number = np.searchsorted(starts, places, side="right")  # parameters that begin before or at the place
        inside = np.maximum(ends[number - 1] - places, 0) * (number > 0)
        return held[number] - inside


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor

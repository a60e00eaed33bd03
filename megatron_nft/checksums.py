"""Checksums by which the trainer's weights and the sampler's are compared. Both rooms make them; neither imports the other."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Checksum(NamedTuple):
    """Of a tensor, or of several together."""

    total: int  # the sum of the numbers' bits, read as integers, modulo 2^64
    dtype: str


Checksums = Mapping[frozenset[str], Checksum]  # by the Hugging Face names of the tensors that were summed together


def bit_sum(values: Tensor) -> Tensor:
    """int64 []: the sum of the numbers' bits, read as integers. It does not ask how a tensor is cut, fused or ordered."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.detach().contiguous().view(integers).sum(dtype=torch.int64)


def differing(of_trainer: Checksums, of_sampler: Checksums) -> tuple[list[str], frozenset[str]]:
    """Names of the tensors whose checksums differ, one line for those that are summed together; and of all that could be compared: those
    of which one side has no checksum, or which the two hold in different dtypes, cannot."""
    owner = {name: names for names in of_trainer for name in names}
    found, compared = [], frozenset()
    for names, held in of_sampler.items():
        parts = {owner.get(name, frozenset()) for name in names}
        if frozenset().union(*parts) != names or {of_trainer[part].dtype for part in parts} != {held.dtype}:
            continue
        compared |= names
        if (sum(of_trainer[part].total for part in parts) - held.total) % 2**64:
            found.append(_together(sorted(names)))
    return found, compared


def _together(names: list[str]) -> str:
    return " + ".join(names) if len(names) <= 3 else f"{names[0]} + ... + {names[-1]} ({len(names)} tensors in one)"

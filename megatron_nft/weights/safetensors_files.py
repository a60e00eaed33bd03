"""safetensors files by plain reads and writes: nothing is mapped into memory, so what was read does not stay resident."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_nft.errors import UserError
from megatron_nft.files import AGAIN

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # safetensors' names
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {name: dtype.itemsize for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own


def supported(name: str, dtype: object, where: Path) -> None:
    """Raise UserError for a tensor of `where` whose dtype, by torch's or safetensors' name, is none that a model here may have."""
    if dtype not in DTYPES and dtype not in _NAMES:
        raise UserError(f"{name} in {where} is stored as {dtype}", "choose a model in bfloat16, float16 or float32")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int  # bytes from the file's first
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, on the CPU. Raises UserError where the file has become shorter."""
        content = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start)
        if len(content) != self.nbytes:
            raise UserError(f"{self.file} is damaged or incomplete (it ends within a tensor)", AGAIN)
        return torch.from_numpy(content).view(DTYPES[self.dtype]).view(self.shape)


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Raises UserError for a file that is damaged, or not as long as its header says."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else -1
        if not 0 < length <= min(size - 8, HEADER_LIMIT):
            raise _damaged(file, "no header")
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        found = {name: _stored(file, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(file, f"its header cannot be read: {error!r}") from None
    end = 8 + length
    for name, place in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if place.start != end or (place.dtype in _SIZES and place.nbytes != math.prod(place.shape) * _SIZES[place.dtype]):
            raise _damaged(file, f"its header lies about {name}")
        end += place.nbytes
    if end != size:
        raise _damaged(file, f"it has {size} bytes and its header says {end}")
    return found


def _stored(file: Path, base: int, entry: dict) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end - begin, *shape)) or not isinstance(entry["dtype"], str):
        raise ValueError(entry)
    return Stored(file, entry["dtype"], shape, base + begin, end - begin)


def _damaged(file: Path, how: str) -> UserError:
    return UserError(f"{file} is damaged or incomplete ({how})", AGAIN)


@dataclass(frozen=True)
class Kind:
    """What a tensor will be, before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(file: Path, kinds: dict[str, Kind], get: Callable[[str], Tensor]) -> None:
    """Write a safetensors file under another name, and rename it. Memory: one tensor; get is asked for each, once.

    Raises ValueError for a tensor that is not of its kind.
    """
    names = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)  # every tensor then starts at a multiple of its item
    unfinished = file.with_name(file.name + ".unfinished")
    with open(unfinished, "wb") as stream:
        stream.write(_header(names, kinds))
        for name in names:
            tensor = get(name)
            if (tuple(tensor.shape), tensor.dtype) != (kinds[name].shape, kinds[name].dtype):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, it was to be {kinds[name]}")
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(file)


def _header(names: list[str], kinds: dict[str, Kind]) -> bytes:
    entries, start = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        kind = kinds[name]
        entries[name] = {"dtype": _NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, start + kind.nbytes]}
        start += kind.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

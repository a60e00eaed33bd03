"""The GPUs a plan can be for: the vendor's data sheets."""

import difflib
from dataclasses import dataclass

from megatron_nft.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the node's network. Rates a second, one direction."""

    name: str
    memory: int  # bytes that nvidia-smi reports
    bf16: float  # dense operations
    fp8: float | None
    bandwidth: float  # bytes of its memory
    nvlink: float  # bytes to the other GPUs of the node
    network: float  # bytes to other nodes
    host: float  # bytes to the host's memory


GIB = 2**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80 * GIB, 312e12, None, 2.039e12, 300e9, 25e9, 25e9),
        Gpu("H100", 80 * GIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, 50e9),
        Gpu("H200", 141 * GIB, 989e12, 1979e12, 4.8e12, 450e9, 50e9, 50e9),
        Gpu("B200", 180 * GIB, 2250e12, 4500e12, 7.7e12, 900e9, 50e9, 50e9),
    )
}


def find(name: str) -> Gpu:
    """The GPU of that name. Raises UserError with the nearest one where there is none."""
    if name not in GPUS:
        near = difflib.get_close_matches(str(name).upper(), GPUS, 1)
        raise UserError(
            f"plan.gpu is {name!r}, which is not known", f"did you mean {near[0]}?" if near else f"use one of {', '.join(GPUS)}"
        )
    return GPUS[name]

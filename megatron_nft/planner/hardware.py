"""The GPUs a plan can be for: the vendors' data sheets, and apart from them what programs reach of these."""

import difflib
import re
from dataclasses import dataclass

from megatron_nft.errors import UserError

PUBLISHED = "published (docs/planner.md)"


@dataclass(frozen=True)
class Achieved:
    """What programs reach of a data sheet's rates with large, well-shaped work; what smaller work loses is worked out in kernels.py.
    Shares, where nothing else is said. The defaults are published figures, the same for all GPUs."""

    matrix: float  # of bf16, by matrix products
    matrix_fp8: float  # of fp8
    attention: float  # of bf16, by flash attention's forward pass over long sequences
    attention_backward: float
    # FlashAttention-3's curve: 330 TFLOP/s at 1,024 tokens and 600 at 16,384 (arXiv 2407.08608, figure 5)
    half_rate: float = 850.0  # tokens of a sequence with which attention reaches half of its full rate
    memory: float = 0.80  # of the memory's bandwidth, by kernels that stream: copies reach 0.85 to 0.9, norms and activations 0.7 to 0.8
    decode: float = 0.80  # the same, by products of few rows, which read weights
    # NCCL's large messages. NVLink: 340 to 370 of 450 GB/s bus bandwidth on 8 H100, 230 to 240 of 300 on A100 (nccl-tests). Network: 40 to
    # 45 of 50 GB/s a GPU with one 400 Gbit/s adapter each (nccl-tests on 2 to 64 nodes)
    nvlink: float = 0.78
    network: float = 0.80
    host: float = 0.80  # of PCIe's rate, pinned memory
    launch: float = 6e-6  # seconds of the CPU for a kernel that PyTorch starts: 5 to 10 microseconds of dispatch
    source: str = PUBLISHED  # in words, where all of this is from


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the node's network. Rates a second, one direction."""

    name: str
    memory: int  # bytes, the vendor's figure in GiB; memory.py knows what of it a process can have
    bf16: float  # dense operations
    fp8: float | None
    bandwidth: float  # bytes of its memory
    nvlink: float  # bytes to the other GPUs of the node
    network: float  # bytes to other nodes
    host: float  # bytes to the host's memory
    processors: int  # streaming multiprocessors: tiles of a matrix product that run at a time
    achieved: Achieved  # all above is the vendor's, this is not


# Matrix products. cuBLAS alone reaches 0.80 of A100's BF16 and, at 700 W, 0.70 to 0.75 of H100's (8,192 cubed); 0.65 to 0.70 of H100's
# FP8 (1,290 to 1,382 TFLOP/s: Azure's ND H100 v5 results of NVIDIA's AI benchmarking guide). In training, with clocks that fall under load
# and neighbours that take memory bandwidth, it is less: 0.74, 0.66 and 0.60 are set by the calibration rows of docs/planner.md. B200: as
# H100 in BF16, 0.58 in FP8; no row was used to set them.
# Attention, causal, forward and backward. FlashAttention-2 on A100: up to 0.66 and 0.56 (arXiv 2307.08691, figures 5 and 6);
# FlashAttention-3 on H100: 0.62 and 0.52 (arXiv 2407.08608, figures 5 and 6: head dimension 128); cuDNN on B200: 0.60 and 0.45.
_AMPERE = Achieved(0.74, 0.0, 0.66, 0.56)
_HOPPER = Achieved(0.66, 0.60, 0.62, 0.52)
_BLACKWELL = Achieved(0.66, 0.58, 0.60, 0.45)

GIB = 2**30
# Data sheets: A100 80GB SXM (NVLink 600 GB/s both ways, PCIe 4 x16), H100 SXM5 (900 GB/s, PCIe 5 x16), H200 SXM, HGX B200 (1.8 TB/s).
# Network: one adapter a GPU, 200 Gbit/s in DGX A100, 400 Gbit/s in DGX H100, H200 and B200.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80 * GIB, 312e12, None, 2.039e12, 300e9, 25e9, 32e9, 108, _AMPERE),
        Gpu("H100", 80 * GIB, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, 64e9, 132, _HOPPER),
        Gpu("H200", 141 * GIB, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, 64e9, 132, _HOPPER),
        Gpu("B200", 180 * GIB, 2250e12, 4500e12, 7.7e12, 900e9, 50e9, 64e9, 148, _BLACKWELL),
    )
}


def find(name: str) -> Gpu:
    """The GPU of that name, in capitals or not. Raises UserError with those that are known where there is none."""
    known = str(name).upper()
    if known not in GPUS:
        near = difflib.get_close_matches(known, GPUS, 1)
        raise UserError(f"plan.gpu is {name!r}", f"use one of {', '.join(GPUS)}" + (f" (did you mean {near[0]}?)" if near else ""))
    return GPUS[known]


def known(seen: str) -> str | None:
    """The name here of a GPU that the driver calls `seen` (NVIDIA H100 80GB HBM3); None: it has none, or one of another memory."""
    gigabytes = re.search(r"\b(\d+) ?GB\b", seen)
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name}\b", seen) and (gigabytes is None or int(gigabytes[1]) >= gpu.memory // GIB):
            return name
    return None


def check_fp8(gpu: Gpu, asked: str) -> None:
    """Raises UserError where the GPU has no FP8 and the setting `asked` wants it."""
    if gpu.fp8 is None:
        raise UserError(f"{asked} is FP8, which {gpu.name} does not compute in", f"leave {asked} out, or plan for H100, H200 or B200")

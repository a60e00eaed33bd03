"""Seconds of a GPU's kernels: matrix products, attention, and what only moves memory."""

import math

import numpy as np

from megatron_nft.planner.hardware import Gpu

TILE = (128, 256)  # rows and columns that one multiprocessor works on: cuBLAS's usual choice on Ampere and Hopper


def matrix_product(gpu: Gpu, rows: float, columns: float, depth: float, fp8: bool = False) -> float:
    """Seconds of [rows, depth] x [depth, columns]. The last wave of tiles leaves multiprocessors idle (wave quantisation): that is what
    small products lose. Never less than what reading the operands and writing the result takes."""
    if not rows or not columns:
        return 0.0
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    used = tiles / (math.ceil(tiles / gpu.processors) * gpu.processors)
    # a product of few tiles is cut along its depth, too: no fewer than three quarters of the multiprocessors are then at work
    used = max(used, 0.75) if tiles < gpu.processors else used
    padded = math.ceil(rows / TILE[0]) * TILE[0] / rows
    rate = (gpu.fp8 * gpu.achieved.matrix_fp8 if fp8 else gpu.bf16 * gpu.achieved.matrix) * used / padded
    size = 1 if fp8 else 2
    moved = size * depth * (rows + columns) + 2 * rows * columns
    return max(2 * rows * columns * depth / rate, moved / (gpu.bandwidth * gpu.achieved.memory))


def attention(gpu: Gpu, squares: float, channels: float, length: float, backward: bool = False) -> float:
    """Seconds of causal flash attention: `squares`, the sum of the squares of the sequences' lengths; channels, heads x head dimension on
    this GPU; length, of a typical sequence. Backward: 2.5 times the operations, for the scores are made again."""
    operations = 2 * squares * channels * (2.5 if backward else 1)
    share = gpu.achieved.attention_backward if backward else gpu.achieved.attention
    return operations / (gpu.bf16 * share * length / (length + gpu.achieved.half_rate)) if operations else 0.0


def moved(gpu: Gpu, nbytes: float) -> float:
    """Seconds of kernels that read and write so many bytes in all."""
    return nbytes / (gpu.bandwidth * gpu.achieved.memory)


def product_of_few_rows(gpu: Gpu, rows: np.ndarray, weights: float, nbytes: float, fp8: bool) -> np.ndarray:
    """Seconds of matrix products with so many weights and few rows [any shape], as in decoding: reading `nbytes` of weights or the
    operations, whichever is longer, and both where they are near each other (they overlap, but not wholly)."""
    rate = gpu.fp8 * gpu.achieved.matrix_fp8 if fp8 else gpu.bf16 * gpu.achieved.matrix
    reading = nbytes / (gpu.bandwidth * gpu.achieved.decode)
    computing = 2.0 * np.maximum(rows, 0) * weights / rate
    return (reading**_SHARP + computing**_SHARP) ** (1 / _SHARP)


_SHARP = 3.0

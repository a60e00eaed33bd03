"""What the trainer tells a server of a weight transfer, in the words of vLLM's back ends. Imports no vLLM."""

from typing import Any

import torch
from torch import Tensor

GLOO, NCCL = "megatron_nft_gloo", "nccl"  # names of the back ends: the one in transfer.py, and vLLM's own


def backend() -> str:
    """The one for this machine."""
    return NCCL if torch.cuda.is_available() else GLOO


def init_info(address: str, port: int, workers: int, timeout: float) -> dict[str, Any]:
    """What the server is told at init_weight_transfer_engine."""
    info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": 1 + workers}
    return info if torch.cuda.is_available() else info | {"timeout": timeout}


def bucket_info(tensors: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """What the server is told of a bucket at update_weights."""
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }

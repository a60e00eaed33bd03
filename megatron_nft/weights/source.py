"""A model's weights in whatever they are kept: a Hugging Face directory, or a checkpoint, converted or from training."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_nft.errors import UserError
from megatron_nft.weights.buckets import Bucket, Slot
from megatron_nft.weights.huggingface import HuggingFaceWeights, load_huggingface, read_json
from megatron_nft.weights.torch_dist import BACKEND, TorchDistWeights

MANIFEST = "manifest.json"  # of a checkpoint of ours


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory holds a distributed checkpoint, and not a Hugging Face model."""
    return any((Path(directory) / name).is_file() for name in (BACKEND, MANIFEST))


def load_weights(directory: str | Path) -> HuggingFaceWeights | TorchDistWeights:
    """Open a model without reading its tensors. Raises UserError as load_huggingface and TorchDistWeights do."""
    directory = Path(directory)
    if not is_checkpoint(directory):
        return load_huggingface(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"no config.json in the checkpoint {directory}", "convert it to a Hugging Face directory with --hf-config")
    return TorchDistWeights(directory, read_json(directory / "config.json"))


def read_buckets(source: HuggingFaceWeights | TorchDistWeights) -> Iterator[Bucket]:
    """The model from its files as a sampler takes it from the trainer, one tensor at a time."""
    for name in source.names():
        tensor = source.get(name).contiguous()
        yield Bucket(tensor.reshape(-1).view(torch.uint8), [Slot(name, tuple(tensor.shape), tensor.dtype, 0)])

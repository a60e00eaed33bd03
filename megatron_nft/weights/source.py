"""A model's weights in whatever they are kept: a Hugging Face directory, or a checkpoint, converted or from training."""

from pathlib import Path

from megatron_nft.errors import UserError
from megatron_nft.weights.huggingface import HuggingFaceWeights, load_huggingface, read_json
from megatron_nft.weights.torch_dist import BACKEND, TorchDistWeights


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory holds a distributed checkpoint, and not a Hugging Face model."""
    return (Path(directory) / BACKEND).is_file()


def load_weights(directory: str | Path) -> HuggingFaceWeights | TorchDistWeights:
    """Open a model without reading its tensors. Raises UserError as load_huggingface and TorchDistWeights do."""
    directory = Path(directory)
    if not is_checkpoint(directory):
        return load_huggingface(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"no config.json in the checkpoint {directory}", "convert it to a Hugging Face directory with --hf-config")
    return TorchDistWeights(directory, read_json(directory / "config.json"))

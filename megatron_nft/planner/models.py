"""The config.json of the model that a plan is for: its own, or, where the model is not on this machine, the published one of that name."""

from dataclasses import dataclass
from pathlib import Path

from megatron_nft.errors import UserError
from megatron_nft.files import read_json

PUBLISHED = Path(__file__).parent / "models"  # NAME.json: what shapes and windows need of https://huggingface.co/Qwen/NAME


@dataclass(frozen=True)
class Model:
    """A config.json, and in words where it is from."""

    hf: dict
    told: str


def published() -> list[str]:
    """Names of the models that can be planned for without being here."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def find(path: str) -> Model:
    """Of model.path: a Hugging Face directory, a checkpoint, or a path whose last part is the name of a published model.

    Raises UserError for a directory without config.json, and for one that is not there and has no known name.
    """
    directory = Path(path)
    if (directory / "config.json").is_file():
        return Model(read_json(directory / "config.json"), str(directory))
    if directory.is_dir():
        raise UserError(f"no config.json in {directory}", "give the directory of a Hugging Face model or of a checkpoint")
    name = directory.name.lower()
    if name not in published():
        raise UserError(
            f"no model directory at {directory}", f"give one with a config.json, or name a published model: {', '.join(published())}"
        )
    return Model(read_json(PUBLISHED / f"{name}.json"), f"{directory.name}, not on this machine: its published config.json")

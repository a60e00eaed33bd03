"""Writing Hugging Face directories: complete, or not there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_nft.errors import UserError
from megatron_nft.weights.huggingface import INDEX, SINGLE, read_json

# config, tokenizer and chat template, copied from the template to a written directory; config.json is always there
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)


def save_huggingface(
    directory: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    template_dir: str | Path,
    max_shard_bytes: float = 5e9,
    replace: bool = False,
) -> None:
    """Write tensors as a Hugging Face directory, with config, tokenizer and chat template copied from template_dir. The dtype that
    config.json names becomes the one the tensors have, where they have one.

    It is written under a temporary name beside `directory` and renamed at the end. Memory: one shard, at most max_shard_bytes (or one
    tensor). replace: let it take the place of a directory that is there. Raises UserError where there is one and replace is not set,
    and for a template without config.json, both before the first tensor is asked for.
    """
    directory, template = Path(directory).resolve(), Path(template_dir).resolve()
    if not (template / "config.json").is_file():
        raise UserError(f"no config.json in {template}", "give the Hugging Face directory the model came from")
    if directory == template or not replace:
        check_vacant(directory)
    with whole_or_nothing(directory) as partial:
        copy_companions(template, partial)
        _name_dtype(partial / "config.json", _write_shards(partial, tensors, max_shard_bytes))


def check_vacant(directory: Path) -> None:
    """Raise UserError unless nothing, or an empty directory, is there."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already", "choose a new directory, or remove it")


@contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory` to write into; it takes that place at the end of the block, and is removed if the block fails."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run's
    partial.mkdir(parents=True)
    try:
        yield partial
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: float) -> set[torch.dtype]:
    """Write the tensors in shards as they come; one shard gets the plain name, several get an index. Returns the dtypes written."""
    shards: list[list[str]] = []
    dtypes: set[torch.dtype] = set()
    shard: dict[str, Tensor] = {}
    total = filled = 0

    def flush() -> None:
        file = directory / f"shard-{len(shards)}"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors keeps its files to their owner
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_shard_bytes:
            flush()
            filled = 0
        shard[name] = tensor.detach().to("cpu").contiguous()
        filled += tensor.nbytes
        total += tensor.nbytes
        dtypes.add(tensor.dtype)
    flush()
    _name_shards(directory, shards, total)
    return dtypes


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, which carry the number of shards, and write the index."""
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for number, file in enumerate(files):
        (directory / f"shard-{number}").rename(directory / file)
    weight_map = {name: file for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_companions(template: Path, directory: Path) -> None:
    """Copy what belongs to a model besides its tensors: config, generation settings, tokenizer, chat template."""
    for pattern in COMPANIONS:
        for source in template.glob(pattern):
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, directory / source.name)


def _name_dtype(file: Path, dtypes: set[torch.dtype]) -> None:
    """Set the dtype of a config.json, which loaders follow. Left alone where it is right, and where the tensors have several."""
    config = read_json(file)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # transformers 5's and 4's; both read the latter
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(names) == 1 and {config.get(key) for key in keys} != names:
        config.update(dict.fromkeys(keys, *names))
        file.write_text(json.dumps(config, indent=2) + "\n")

"""Writing Hugging Face directories: complete, or not there."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_nft.errors import UserError
from megatron_nft.weights.huggingface import INDEX, SINGLE, read_json
from megatron_nft.weights.resume import Unfinished, check_vacant, partial_of, resumable, stamps
from megatron_nft.weights.safetensors_files import Kind, write_file

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
MAX_SHARD = 5e9  # bytes of tensors in a file


def save_huggingface(
    directory: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    template_dir: str | Path,
    max_shard_bytes: float = MAX_SHARD,
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


@contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory` to write into; it takes that place at the end of the block, and is removed if the block fails."""
    partial = partial_of(directory)
    shutil.rmtree(partial, ignore_errors=True)  # a killed run's
    partial.mkdir(parents=True)
    try:
        yield partial
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert_to_huggingface(
    directory: Path,
    kinds: dict[str, Kind],
    get: Callable[[str], Tensor],
    template: Path,
    source: Path,
    progress: Callable[[int], None],
    max_shard_bytes: float = MAX_SHARD,
) -> None:
    """Write a Hugging Face directory as save_huggingface does, but of tensors that are known beforehand, and resumably (see resume.py).

    get is asked for each tensor once, in order. Memory: one tensor. source: the directory they come from. progress is told bytes.
    """
    directory, template = directory.resolve(), template.resolve()
    shards = _plan(kinds, max_shard_bytes)
    made_of = {"to": "huggingface", "files": stamps({template, source}), "max_shard_bytes": max_shard_bytes}
    total = sum(kind.nbytes for kind in kinds.values())
    with resumable(directory, made_of, total) as unfinished:
        for file, names in shards.items():
            mine = {name: kinds[name] for name in names}
            _write_shard(unfinished, file, mine, get, progress)
        copy_companions(template, unfinished.directory)
        _write_index(unfinished.directory, {name: file for file, names in shards.items() for name in names}, total)
        _name_dtype(unfinished.directory / "config.json", {kind.dtype for kind in kinds.values()})


def _plan(kinds: dict[str, Kind], max_shard_bytes: float) -> dict[str, list[str]]:
    """Names of the tensors by the file they go to, in order."""
    shards, filled = [[]], 0
    for name, kind in kinds.items():
        if shards[-1] and filled + kind.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += kind.nbytes
    return dict(zip(_file_names(len(shards)), shards))


def _write_shard(
    unfinished: Unfinished, file: str, kinds: dict[str, Kind], get: Callable[[str], Tensor], progress: Callable[[int], None]
) -> None:
    if unfinished.finished(file) is not None:
        progress(sum(kind.nbytes for kind in kinds.values()))
        return

    def told(name: str) -> Tensor:
        progress(kinds[name].nbytes)
        return get(name)

    write_file(unfinished.directory / file, kinds, told)
    unfinished.finish(file)


def _write_index(directory: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """None for a single file."""
    if SINGLE not in weight_map.values():
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


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
    for number, file in enumerate(_file_names(len(shards))):
        (directory / f"shard-{number}").rename(directory / file)
    weight_map = {name: file for file, names in zip(_file_names(len(shards)), shards) for name in names}
    _write_index(directory, weight_map, total_bytes)


def copy_companions(template: Path, directory: Path) -> None:
    """Copy what belongs to a model besides its tensors: config, generation settings, tokenizer, chat template."""
    for source in _companions(template):
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, directory / source.name)


def check_companions(template: Path) -> None:
    """Raise OSError for a file that copy_companions could not read: said before a conversion, not at its end."""
    for source in _companions(template):
        for file in source.rglob("*") if source.is_dir() else [source]:
            if not file.is_dir():
                file.open("rb").close()


def _companions(template: Path) -> list[Path]:
    return [source for pattern in COMPANIONS for source in template.glob(pattern)]


def _name_dtype(file: Path, dtypes: set[torch.dtype]) -> None:
    """Set the dtype of a config.json, which loaders follow. Left alone where it is right, and where the tensors have several."""
    config = read_json(file)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # transformers 5's and 4's; both read the latter
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(names) == 1 and {config.get(key) for key in keys} != names:
        config.update(dict.fromkeys(keys, *names))
        file.write_text(json.dumps(config, indent=2) + "\n")

"""Hugging Face directories: a lazy reader that checks what it finds, and a writer that leaves nothing half-written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_nft.errors import UserError
from megatron_nft.weights.families import table_for
from megatron_nft.weights.table import HEAD, Table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# config, tokenizer and chat template, copied from the template to a written directory
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
AGAIN = "download or copy the model again"


class HuggingFaceWeights:
    """The tensors of a Hugging Face directory, read from its safetensors files when asked for.

    .config is config.json, .table the model's Table; names() are the table's: a tied model's own copy of the head is left out.
    """

    def __init__(self, directory: Path):
        """Open and check; see load_huggingface."""
        self.directory = directory
        self.config = _read_json(directory / "config.json")
        self.table = table_for(self.config)
        self._files = _open_files(directory)
        self._check()

    def names(self) -> list[str]:
        """Hugging Face names in model order."""
        return list(self.table.hf_shapes())

    def get(self, name: str) -> Tensor:
        """One tensor, in the file's dtype, on the CPU."""
        return self._files[name].get_tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes as they stand in the files, which are the config's."""
        return {name: self._shape(name) for name in self.names()}

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def _check(self) -> None:
        """Raise UserError unless the files hold the config's tensors in the config's shapes."""
        wanted = self.table.hf_shapes()
        if missing := [name for name in wanted if name not in self._files]:
            raise UserError(f"{self.directory} lacks {len(missing)} tensors of its model, the first is {missing[0]}", AGAIN)
        if extra := [name for name in self._files if name not in wanted and not _harmless(name, self.table)]:
            raise UserError(
                f"{self.directory} holds {len(extra)} tensors its config.json has no place for, the first is {extra[0]}",
                "choose the config.json and the weights of one model",
            )
        for name, shape in wanted.items():
            if self._shape(name) != shape:
                raise UserError(
                    f"{name} in {self.directory} is {self._shape(name)}, its config.json says {shape}",
                    "choose the config.json and the weights of one model",
                )


def load_huggingface(directory: str | Path) -> HuggingFaceWeights:
    """Open a Hugging Face directory (config.json; model.safetensors, or shards with their index) without reading its tensors.

    Raises UserError for a directory, config, index, shard or tensor that is missing, damaged, or not the config's.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no model directory at {directory}", "give the path of a downloaded Hugging Face model")
    if not (directory / "config.json").is_file():
        raise UserError(f"no config.json in {directory}", "give the directory of a Hugging Face model")
    return HuggingFaceWeights(directory)


def save_huggingface(
    directory: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    template_dir: str | Path,
    max_shard_bytes: float = 5e9,
    replace: bool = False,
) -> None:
    """Write tensors as a Hugging Face directory, with config, tokenizer and chat template copied from template_dir.

    It is written under a temporary name beside `directory` and renamed at the end. Memory: one shard, at most max_shard_bytes (or one
    tensor). replace: let it take the place of a directory that is there. Raises UserError where there is one and replace is not set,
    and for a template without config.json, both before the first tensor is asked for.
    """
    directory, template = Path(directory).resolve(), Path(template_dir).resolve()
    if not (template / "config.json").is_file():
        raise UserError(f"no config.json in {template}", "give the Hugging Face directory the model came from")
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and (directory == template or not replace):
        raise UserError(f"{directory} exists already", "choose a new directory, or remove it")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run's
    partial.mkdir(parents=True)
    try:
        _copy_companions(template, partial)
        _write_shards(partial, tensors, max_shard_bytes)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: float) -> None:
    """Write the tensors in shards as they come; one shard gets the plain name, several get an index."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = filled = 0

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_shard_bytes:
            flush()
            filled = 0
        shard[name] = tensor.detach().to("cpu").contiguous()
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(directory, shards, total)


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


def _copy_companions(template: Path, directory: Path) -> None:
    for pattern in COMPANIONS:
        for source in template.glob(pattern):
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, directory / source.name)


def _open_files(directory: Path) -> dict:
    """Tensor name -> the open safetensors file that holds it."""
    if (directory / SINGLE).is_file():
        file = _open(directory / SINGLE)
        return dict.fromkeys(file.keys(), file)
    if not (directory / INDEX).is_file():
        raise UserError(f"no safetensors in {directory} (neither {SINGLE} nor {INDEX})", "save the model as safetensors")
    weight_map = _read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{directory / INDEX} has no weight_map", AGAIN)
    shards = {file: _open(directory / file) for file in sorted(set(weight_map.values()))}
    held = {file: set(shard.keys()) for file, shard in shards.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise UserError(f"{directory / INDEX} says {name} is in {file}, which does not hold it", AGAIN)
    return {name: shards[file] for name, file in weight_map.items()}


def _open(file: Path):
    """Map a safetensors file. Raises UserError where it is missing, or damaged (the header tells the length)."""
    if not file.is_file():
        raise UserError(f"{file} is missing, though the index names it", AGAIN)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or incomplete ({error})", AGAIN) from None


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is no JSON ({error})", AGAIN) from None


def _harmless(name: str, table: Table) -> bool:
    """Tensors that say nothing new: a tied model's copy of the head, and the rope frequencies that old Llama files carry."""
    return (table.tied and name in HEAD.huggingface) or name.endswith("rotary_emb.inv_freq")

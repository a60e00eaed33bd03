"""Hugging Face directories: a lazy reader that checks what it finds."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_nft.errors import UserError
from megatron_nft.files import AGAIN, read_json
from megatron_nft.weights.families import table_for
from megatron_nft.weights.safetensors_files import DTYPES, Stored, read_header, supported
from megatron_nft.weights.table import EMBEDDING, HEAD, Table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ONE_MODEL = "choose the config.json and the weights of one model"


class HuggingFaceWeights:
    """The tensors of a Hugging Face directory, read from its safetensors files when asked for.

    .config is config.json, .table the model's Table; names() are the table's: a tied model's own copy of the head is left out.
    """

    def __init__(self, directory: Path):
        """Open and check; see load_huggingface."""
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.table = table_for(self.config)
        self._stored = _open_files(directory, self.table)
        self._check()

    def names(self) -> list[str]:
        """Hugging Face names in model order."""
        return list(self.table.hf_shapes())

    def get(self, name: str) -> Tensor:
        """One tensor, in the file's dtype, on the CPU. Raises UserError for another dtype than dtypes() knows."""
        supported(name, self._stored[name].dtype, self.directory)
        return self._stored[name].read()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes as they stand in the files, which are the config's."""
        return {name: self._shape(name) for name in self.names()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes as they stand in the files. Raises UserError for one that is not bfloat16, float16 or float32."""
        found = {name: self._stored[name].dtype for name in self.names()}
        for name, dtype in found.items():
            supported(name, dtype, self.directory)
        return {name: DTYPES[dtype] for name, dtype in found.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def check_index(self) -> None:
        """Raise UserError for an index whose total_size is not the size of the tensors it names: the sign of files of several models."""
        if (self.directory / SINGLE).is_file():
            return
        metadata = read_json(self.directory / INDEX).get("metadata") or {}
        if not isinstance(metadata, dict):
            raise UserError(f"{self.directory / INDEX} has no object as its metadata", AGAIN)
        told = metadata.get("total_size")
        held = sum(stored.nbytes for stored in self._stored.values())
        if told is not None and told != held:
            raise UserError(f"{self.directory / INDEX} says total_size {told}, and the tensors it names have {held} bytes",
                            "download or copy the model again; if the files are right, correct that number")  # fmt: skip

    def _check(self) -> None:
        """Raise UserError unless the files hold the config's tensors in the config's shapes."""
        wanted = self.table.hf_shapes()
        if missing := [name for name in wanted if name not in self._stored]:
            raise UserError(f"{self.directory} lacks {len(missing)} tensors of its model, the first is {missing[0]}", AGAIN)
        if extra := [name for name in self._stored if name not in wanted and not _harmless(name, self.table)]:
            raise UserError(
                f"{self.directory} holds {len(extra)} tensors its config.json has no place for, the first is {extra[0]}", ONE_MODEL
            )
        for name, shape in wanted.items():
            if self._shape(name) != shape:
                raise UserError(f"{name} in {self.directory} is {self._shape(name)}, its config.json says {shape}", ONE_MODEL)
        self._check_head()

    def _check_head(self) -> None:
        """Raise UserError where a tied model's files hold a head of its own, which would be lost."""
        (embedding,), (head,) = EMBEDDING.huggingface, HEAD.huggingface
        if self.table.tied and head in self._stored and not torch.equal(self.get(head), self.get(embedding)):
            raise UserError(f"{head} in {self.directory} is not {embedding}, though config.json sets tie_word_embeddings", ONE_MODEL)


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


def _open_files(directory: Path, table: Table) -> dict[str, Stored]:
    """Every tensor by its name."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise UserError(f"no safetensors in {directory} (neither {SINGLE} nor {INDEX})", "save the model as safetensors")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{directory / INDEX} has no weight_map", AGAIN)
    if strange := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        raise UserError(f"{directory / INDEX} names no file for {strange[0]}", AGAIN)
    files = sorted(set(weight_map.values()))
    if gone := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{directory / gone[0]} is missing, though the index names it", AGAIN)
    held = {file: read_header(directory / file) for file in files}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise UserError(f"{directory / INDEX} says {name} is in {file}, which does not hold it", AGAIN)
    for file, found in held.items():
        if hidden := [name for name in found if name not in weight_map and not _harmless(name, table)]:
            raise UserError(f"{directory / file} holds {hidden[0]}, which {INDEX} does not name", AGAIN)
    return {name: held[file][name] for name, file in weight_map.items()}


def _harmless(name: str, table: Table) -> bool:
    """Tensors that say nothing new: a tied model's copy of the head, and the rope frequencies that old Llama files carry."""
    return (table.tied and name in HEAD.huggingface) or name.endswith("rotary_emb.inv_freq")

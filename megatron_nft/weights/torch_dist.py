"""Megatron-Core's distributed checkpoints ("torch_dist"), read one tensor at a time without Megatron-Core and without a process group."""

import io
from collections import defaultdict
from itertools import product
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType

from megatron_nft.errors import UserError
from megatron_nft.weights.families import table_for
from megatron_nft.weights.huggingface import read_json
from megatron_nft.weights.keys import Place, find_places, megatron_shapes
from megatron_nft.weights.safetensors_files import supported

METADATA, BACKEND, LATEST = ".metadata", "metadata.json", "latest_checkpointed_iteration.txt"
OLDER = "use an older checkpoint"


def find_iteration(directory: Path) -> Path:
    """The directory itself if it holds a distributed checkpoint, or the newest one that Megatron-LM saved below it.

    Raises UserError for a directory that is neither, and for a format other than torch_dist.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory", "give the directory of a checkpoint")
    if (directory / LATEST).is_file():
        newest = (directory / LATEST).read_text(errors="replace").strip()
        if newest != "release" and not newest.isdecimal():
            raise UserError(f"{directory / LATEST} says {newest[:40]!r}, which is no iteration", "name an iter_ directory")
        directory /= newest if newest == "release" else f"iter_{int(newest):07d}"
    if not (directory / BACKEND).is_file():
        raise UserError(
            f"{directory} is no distributed checkpoint ({BACKEND} is missing)",
            "name an iter_ directory that Megatron-LM saved with --ckpt-format torch_dist",
        )
    if (backend := read_json(directory / BACKEND).get("sharded_backend")) != "torch_dist":
        raise UserError(f"{directory} has the format {backend}", "save it with --ckpt-format torch_dist")
    return directory


class TorchDistWeights:
    """The model in a distributed checkpoint, under its Hugging Face names and under Megatron's; an optimizer beside it is passed over.

    .config is the Hugging Face config.json that says what the model is, .table the model's Table. Memory: what is asked for, and one
    stored piece of it (a rank's slice of a tensor).
    """

    def __init__(self, directory: Path, config: dict):
        """Open and check. Raises UserError for a checkpoint that is damaged or not the config's."""
        self.directory, self.config, self.table = directory, config, table_for(config)
        self._reader = FileSystemReader(directory)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            entries = metadata.state_dict_metadata
            self._tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
            sizes = {key: tuple(entry.size) for key, entry in self._tensors.items()}
            for entry in self._tensors.values():  # all that is read of it later
                _ = entry.properties.dtype, [(tuple(chunk.offsets), chunk.sizes.numel()) for chunk in entry.chunks]
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(f"the checkpoint {directory} is damaged: {METADATA} cannot be read ({error!r})", OLDER) from error
        self._places = find_places(sizes, self.table, str(directory))
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}  # by key and leading numbers
        self._parts: tuple[str, dict[str, Tensor]] = ("", {})  # the last tensor that get() split
        self._shapes, self._megatron = megatron_shapes(self.table), {}
        for entry, shape in self._shapes.items():
            self._megatron |= dict.fromkeys(dict(self.table.to_hf(entry, torch.empty(shape, device="meta"))), entry)

    def names(self) -> list[str]:
        """Hugging Face names in model order."""
        return list(self.table.hf_shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes under Hugging Face names."""
        return self.table.hf_shapes()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes as stored, under Hugging Face names. Raises UserError for one that is not bfloat16, float16 or float32."""
        found = {name: self._tensors[self._places[entry][0].key].properties.dtype for name, entry in self._megatron.items()}
        for name, dtype in found.items():
            supported(name, dtype, self.directory)
        return found

    def get(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name, on the CPU. Neighbours that share a Megatron tensor are best asked for in turn."""
        entry = self._megatron[name]
        if self._parts[0] != entry:
            self._parts = ("", {})
            self._parts = entry, dict(self.table.to_hf(entry, self.megatron(entry)))
        return self._parts[1][name]

    def megatron(self, name: str) -> Tensor:
        """A full Megatron tensor by its name in the table, without padding of the vocabulary, on the CPU.

        Raises UserError where the files are damaged or lack a part of it.
        """
        name = self.table.canonical(name)
        parts = [self._read(place) for place in self._places[name]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[: self._shapes[name][0]]  # only a vocabulary is longer

    def _read(self, place: Place) -> Tensor:
        """What lies at a place."""
        entry, count = self._tensors[place.key], len(place.leading)
        target = torch.empty(entry.size[count:], dtype=entry.properties.dtype)
        whole = target.view(*[1] * count, *target.shape)
        planner = _OnePlace(whole)
        items = [_item(place, count, chunk) for chunk in self._chunks_of(place)]
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise UserError(f"the checkpoint {self.directory} is damaged: it lacks a part of {place.key}", OLDER)
        try:
            for item in items:
                self._check_sum(item.storage_index)
            self._reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:  # a damaged file raises what zip, pickle and torch have
            what = str(error).splitlines()[0] if str(error) else repr(error)
            raise UserError(f"the checkpoint {self.directory} is damaged: {place.key} cannot be read ({what})", OLDER) from error
        return target

    def _check_sum(self, index: MetadataIndex) -> None:
        """Raise where the bytes of an item are not what was written: each is a zip file with checksums, which torch does not look at."""
        info = self._reader.storage_data[index]
        with open(self.directory / info.relative_path, "rb") as stream, ZipFile(_View(stream, info.offset, info.length)) as item:
            if bad := item.testzip():
                raise BadZipFile(f"the checksum of {bad} is wrong")

    def _chunks_of(self, place: Place) -> list[ChunkStorageMetadata]:
        """The stored pieces that hold a part of a place."""
        if place.key not in self._chunks:
            at, count = defaultdict(list), len(place.leading)
            for chunk in self._tensors[place.key].chunks:
                for leading in product(*(range(o, o + s) for o, s in zip(chunk.offsets[:count], chunk.sizes[:count]))):
                    at[leading].append(chunk)
            self._chunks[place.key] = at
        return self._chunks[place.key][place.leading]


def _item(place: Place, count: int, chunk: ChunkStorageMetadata) -> ReadItem:
    """Read what a chunk has of a place into where it belongs."""
    inner = [0] * count
    begin = [number - start for number, start in zip(place.leading, chunk.offsets)] + [0] * (len(chunk.sizes) - count)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(place.key),
        dest_offsets=torch.Size([*inner, *chunk.offsets[count:]]),
        storage_index=MetadataIndex(place.key, chunk.offsets),
        storage_offsets=torch.Size(begin),
        lengths=torch.Size([*[1] * count, *chunk.sizes[count:]]),
    )


class _View(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int):
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        self._stream.seek(self._offset + self._at)
        read = self._stream.readinto(memoryview(buffer)[: max(self._length - self._at, 0)])
        self._at += read
        return read


class _OnePlace(LoadPlanner):
    """Puts what is read into one tensor. Its plans are made elsewhere."""

    def __init__(self, target: Tensor):
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        slices = tuple(slice(start, start + length) for start, length in zip(read_item.dest_offsets, read_item.lengths))
        return self.target[slices]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """resolve_tensor gave a view of the target."""

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is no tensor")

    def set_up_planner(self, state_dict, metadata=None, is_coordinator: bool = False) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

"""Megatron checkpoints written from tensors that are read when their turn comes.

Megatron-Core decides what is written: the model is built without memory (on the meta device), and its sharded_state_dict, under no
parallelism, names the keys, shapes and offsets, so that the checkpoint loads under any layout. It goes through Megatron's own
dist_checkpointing.save, which writes what belongs beside the tensors; the tensors are written here, by torch.distributed.checkpoint.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_nft.config import Config
from megatron_nft.policy import checkpoint, model, settings, versions
from megatron_nft.weights import HuggingFaceWeights, Unfinished
from megatron_nft.weights.keys import Place, leading_axes, megatron_name

PIECE = 64 * 2**20  # bytes of a stored item: what a reader of a part of a tensor has to hold besides
FILE = 256 * 2**20  # bytes of a file, all of whose items the writer of torch keeps until it is closed


def write_checkpoint(source: HuggingFaceWeights, config: Config, unfinished: Unfinished, progress: Callable[[int], None]) -> None:
    """Write all of a checkpoint but its manifest, skipping files that are finished.

    Needs Megatron's groups for a world of one. Memory: one Megatron tensor and one file. progress is told bytes.
    """
    from megatron.core import dist_checkpointing

    with torch.device("meta"):
        [module] = model.build(source.config, config)
    state = {"model": module.sharded_state_dict(metadata=dict(checkpoint.METADATA))}
    writer = _Writer(unfinished.directory)
    planner = _Tensors(source, settings.dtype_of(config.model.precision), progress)
    strategy = versions.save_strategy(lambda sharded, directory: _write(sharded, planner, writer, unfinished))
    dist_checkpointing.save(state, str(unfinished.directory), strategy, content_metadata=dict(checkpoint.METADATA))


def _write(sharded: dict, planner: "_Tensors", writer: "_Writer", unfinished: Unfinished) -> None:
    """What Megatron-Core asks its strategies for: write the sharded tensors and objects."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    values = list(nested_values(sharded))
    objects = [value for value in values if isinstance(value, ShardedObject)]
    items = [planner.object_item(value) for value in objects]
    items += [item for value in values if not isinstance(value, ShardedObject) for item in planner.tensor_items(value)]
    plans, metadata = planner.create_global_plan([SavePlan(part) for part in _files(items)])
    names = [f"__{number}_0.distcp" for number in range(len(plans))]
    for name, plan in zip(names, writer.prepare_global_plan(plans)):
        if unfinished.finished(name) is None:
            unfinished.finish(name, pickle.dumps(writer.write_data(plan, planner).wait()))
        else:
            planner.progress(sum(map(_nbytes, plan.items)))
    # from the journal in any case: an interrupted run then writes the very bytes of one that was not
    writer.finish(metadata, [pickle.loads(unfinished.finished(name)) for name in names])


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Runs of items of at most FILE bytes."""
    run, filled = [], 0
    for item in items:
        if run and filled + _nbytes(item) > FILE:
            yield run
            run, filled = [], 0
        run.append(item)
        filled += _nbytes(item)
    yield run


def _nbytes(item: WriteItem) -> int:
    """Of a tensor's piece; an object counts nothing."""
    data = item.tensor_data
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize if data else 0


class _Writer(FileSystemWriter):
    """torch's writer without the two things that differ from run to run: the path and a random number."""

    def storage_meta(self) -> None:
        return None


class _Tensors(DefaultSavePlanner):
    """Makes the write items of Megatron's sharded tensors, and reads what they hold when they are written."""

    def __init__(self, source: HuggingFaceWeights, dtype: torch.dtype, progress: Callable[[int], None]):
        super().__init__(flatten_state_dict=False)
        self.source, self.dtype, self.progress = source, dtype, progress
        self._objects: dict[str, io.BytesIO] = {}
        self._last: tuple[str, Tensor | None] = ("", None)  # pieces of a tensor follow each other

    def object_item(self, sharded) -> WriteItem:
        """Of a ShardedObject, in the form Megatron-Core gives it."""
        key = sharded.unique_key
        self._objects[key] = io.BytesIO()
        torch.save([sharded.data], self._objects[key])
        return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)

    def tensor_items(self, sharded) -> Iterator[WriteItem]:
        """Of a ShardedTensor without data: pieces of whole rows."""
        leading = sharded.prepend_axis_num
        offsets, sizes = list(sharded.global_offset), [1] * leading + list(sharded.local_shape)
        rows = max(1, PIECE // (math.prod(sizes[leading + 1 :]) * self.dtype.itemsize))
        for start in range(0, sizes[leading], rows):
            at = torch.Size([*offsets[:leading], offsets[leading] + start, *offsets[leading + 1 :]])
            size = torch.Size([*sizes[:leading], min(rows, sizes[leading] - start), *sizes[leading + 1 :]])
            data = TensorWriteData(ChunkStorageMetadata(at, size), TensorProperties(self.dtype), torch.Size(sharded.global_shape))
            yield WriteItem(MetadataIndex(sharded.key, at), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The piece of a Hugging Face model's tensor that belongs there."""
        if write_item.type == WriteItemType.BYTE_IO:
            return self._objects[write_item.index.fqn]
        key, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        count = leading_axes(key)
        name, _ = megatron_name(Place(key, tuple(chunk.offsets[:count])))
        slices = tuple(slice(start, start + size) for start, size in zip(chunk.offsets[count:], chunk.sizes[count:]))
        piece = self._full(name)[slices].to(self.dtype).reshape(chunk.sizes)
        self.progress(piece.nbytes)
        return piece.contiguous()

    def _full(self, name: str) -> Tensor:
        if self._last[0] != name:
            self._last = ("", None)  # before the next one is read
            self._last = name, self.source.table.to_megatron(name, self.source.get)
        return self._last[1]

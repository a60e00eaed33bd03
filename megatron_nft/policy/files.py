"""Megatron's torch_dist files, planned and written so that training can go on meanwhile. Runs in a thread of its own on every rank."""

import os
import queue
from pathlib import Path

import torch


def plan_files(sharded: dict, directory: Path, group) -> tuple:
    """(writer of this rank's file, torch's metadata of all files on the first rank), as Megatron's torch_dist strategy plans them: that one
    talks to the other ranks by the default process group, which training is using. Collective in `group`."""
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan

    entries, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    writer = _file_writer(directory)
    (_, metadata, _), *_ = save_state_dict_async_plan(torch_dist.mcore_to_pyt_state_dict(entries), writer, group, 0, planner)
    return writer, metadata


def _file_writer(directory: Path):
    """Megatron's writer of torch_dist files, which copies no tensor before it is written and starts no processes."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.planner import WriteItemType

    class Writer(FileSystemWriterAsync):
        def prepare_write_data(self, plan, planner) -> None:
            self.items = [(item, planner.resolve_data(item)) for item in plan.items]
            self.file = f"{plan.storage_data.prefix}0.distcp"

        def paths(self) -> list[Path]:
            return [directory / self.file] if self.items else []

        def write(self) -> list:
            """Write this rank's file; returns torch's results for its index. Raises what the writing raised."""
            if not self.items:
                return []
            objects = [entry for entry in self.items if entry[0].type == WriteItemType.BYTE_IO]
            tensors = ((item, _alone(data)) for item, data in self.items if item.type != WriteItemType.BYTE_IO)
            results, count = queue.Queue(), queue.Queue()
            count.put(0)
            bucket = (os.path.join(directory, self.file), self.file, (objects, tensors))
            FileSystemWriterAsync.write_preloaded_data([self.transforms], 0, bucket, results, count, True)
            _, written = results.get_nowait()
            if isinstance(written, Exception):
                raise written
            return written

    return Writer(str(directory), thread_count=1)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with a storage of its own: torch.save writes the whole storage of a view."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_index(writer, metadata, results: list[list], directory: Path) -> None:
    """Write the index of all ranks' files (.metadata), and which format it is (metadata.json)."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def write_common(common: dict, directory: Path) -> None:
    """Write what all ranks have in common as Megatron-Core 0.16 reads it."""
    torch.save(common, directory / "common.pt")

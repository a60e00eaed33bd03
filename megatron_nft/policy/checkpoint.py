"""Checkpoints: Megatron's distributed format, the files that make it a model of its own (config, tokenizer), and a manifest, written
last. No manifest: not a checkpoint."""

import json
import logging
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import optimizer
from megatron_nft.weights import copy_companions, read_json

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKED = 2**26  # bytes: files up to this size have their checksum in the manifest; reading back more would double the time of a save
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(directory: Path, policy, state: dict) -> None:
    """Collective. `state` must be JSON; everything else comes from the policy. A directory of the same name is replaced.

    The manifest says what is there: the layout, the dtype of the weights, whether there is an optimizer, size and checksum of the
    files, `state`.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if policy.topology.is_first:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(_sharded_state(policy, loading=False), str(directory), strategy, content_metadata=METADATA)
    dist.barrier()
    if policy.topology.is_first:
        copy_companions(Path(policy.config.model.path), directory)
        files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
        write_manifest(directory, files, policy.topology, policy.module.config.params_dtype, _trainable(policy), state)
    dist.barrier()


def write_manifest(directory: Path, files: list[Path], topology, dtype: torch.dtype, optimizer: bool, state: dict) -> None:
    """Of the files of a complete checkpoint; the file that makes it one."""
    manifest = {
        "layout": layout_of(topology),
        "dtype": str(dtype).removeprefix("torch."),
        "optimizer": optimizer,
        "files": {str(file.relative_to(directory)): _fingerprint(file) for file in files},
        "state": state,
    }
    temporary = directory / (MANIFEST + ".partial")
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.rename(directory / MANIFEST)


def load(directory: Path, policy) -> dict:
    """Collective. Raises UserError if the directory is no complete checkpoint, is damaged or lacks an entry; returns the state.

    A policy that is not trainable takes the weights only.
    """
    manifest = read_manifest(directory)
    if _trainable(policy) and not manifest["optimizer"]:
        raise UserError(f"{directory} holds weights without an optimizer", "name a checkpoint of a training run")
    layout = _layout(policy)
    if _trainable(policy):
        check_experts(directory, manifest["layout"], layout)
    wanted = _sharded_state(policy, loading=True)
    if manifest["layout"] != layout:  # every rank's generator belongs to its place in the old layout
        wanted.pop("rng", None)
    with _damage_reported(directory):
        loaded = _read(wanted, directory)
    for key, module in _modules(policy).items():
        module.load_state_dict(loaded[key], strict=True)
    if _trainable(policy):
        optimizer.load(policy.optimizer, loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in wanted:
        _set_rng(loaded["rng"])
    return manifest["state"]


def check_experts(directory: Path, saved: dict, now: dict) -> None:
    """Raise UserError where only one of two layouts deals experts to ranks: Megatron then keeps them in an optimizer of their own."""
    before, after = saved.get("expert", 1), now["expert"]
    if (before > 1) != (after > 1):
        raise UserError(
            f"{directory} was saved with parallel.expert_model_parallel_size {before}, and it is {after} now",
            f"use {'2 or more' if before > 1 else '1'}: with its optimizer a mixture of experts goes from one to the other only as weights",
        )


def _read(wanted: dict, directory: Path) -> dict:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    return dist_checkpointing.load(wanted, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)


@contextmanager
def _damage_reported(directory: Path) -> Iterator[None]:
    """What Megatron and torch raise for entries that are missing, and tensor files that are damaged, becomes a UserError."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:  # its own message names ranks only
        reasons = ", ".join(sorted({str(reason).splitlines()[0] for reason, _ in error.failures.values()}))
        raise UserError(f"the checkpoint {directory} is damaged: {reasons}", "use an older one") from error
    except CheckpointingException as error:
        raise UserError(f"the checkpoint {directory} does not hold this model: {error}", "use the model it was made with") from error


def read_manifest(directory: Path) -> dict:
    """The manifest of a complete checkpoint; UserError where it is missing or a file of it is missing or changed."""
    file = directory / MANIFEST
    if not file.is_file():
        what = f"is no complete checkpoint ({MANIFEST} is missing)" if directory.is_dir() else "is no directory"
        raise UserError(f"{directory} {what}", "name a step_N directory that has one")
    manifest = read_json(file)
    if missing := {"layout", "dtype", "optimizer", "files", "state"} - manifest.keys():
        raise UserError(f"{file} lacks {min(missing)}", "use an older checkpoint")
    for name, fingerprint in manifest["files"].items():
        part = directory / name
        if not part.is_file():
            raise UserError(f"the checkpoint {directory} is damaged: {name} is missing", "use an older one")
        if _fingerprint(part) != fingerprint:
            raise UserError(f"the checkpoint {directory} is damaged: {name} is not what was written", "use an older one")
    return manifest


def _fingerprint(file: Path) -> list[int | None]:
    """Size in bytes, and CRC-32 where the file is small."""
    size = file.stat().st_size
    return [size, zlib.crc32(file.read_bytes()) if size <= CHECKED else None]


def find(config: Config, command: str) -> Path | None:
    """The checkpoint a run of `command` continues from (its state names the command); None for a new run.

    Raises UserError for a run directory that is in use while `resume` is off, and for one whose checkpoints are all damaged: to begin
    anew would overwrite what is there.
    """
    run_dir = Path(config.run_dir)
    if config.resume:
        found = newest(run_dir)
        if found is None and (damaged := [d for d in _numbered(run_dir) if (d / MANIFEST).exists()]):
            read_manifest(damaged[-1])
        if found and (other := read_json(found / MANIFEST)["state"].get("command")) != command:
            raise UserError(f"run_dir {run_dir} holds a run of `{other}`, not of `{command}`", "choose another run_dir")
        return found
    if (run_dir / "config.yaml").exists():
        raise UserError(f"run_dir {run_dir} already holds a run", "choose another run_dir, or set resume=true to continue it")
    return None


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, passing over unfinished and damaged ones; None if there is none."""
    for directory in reversed(_numbered(run_dir)):
        try:
            read_manifest(directory)
            return directory
        except UserError as error:
            if (directory / MANIFEST).exists():
                _log.warning("passing over a checkpoint: %s", error)
    return None


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what was left unfinished."""
    complete = [directory for directory in _numbered(run_dir) if (directory / MANIFEST).exists()]
    for directory in set(_numbered(run_dir)) - set(complete[-keep:]):
        shutil.rmtree(directory)


def _numbered(run_dir: Path) -> list[Path]:
    found = [d for d in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", d.name)]
    return sorted(found, key=lambda d: int(d.name.removeprefix("step_")))


def _trainable(policy) -> bool:
    return hasattr(policy, "optimizer")


def _layout(policy) -> dict:
    return layout_of(policy.topology)


def layout_of(t) -> dict:
    """The sizes of a topology, as the manifest has them."""
    layout = {"tensor": t.tensor_size, "pipeline": t.pipeline_size, "data": t.data_size, "context": t.context_size}
    return layout | {"virtual_pipeline": t.virtual_size, "expert": t.expert_size, "expert_tensor": t.expert_tensor_size}


def _modules(policy) -> dict:
    """The model's chunks by their keys in the state; in the files a tensor's name tells its layer, whatever the chunks."""
    return {f"model{i}" if len(policy.modules) > 1 else "model": module for i, module in enumerate(policy.modules)}


def _sharded_state(policy, loading: bool) -> dict:
    metadata = dict(METADATA)  # Megatron puts its groups into it
    model = {key: module.sharded_state_dict(metadata=metadata) for key, module in _modules(policy).items()}
    state = dict(model)
    if _trainable(policy):
        state["rng"] = _rng_object(policy.topology)
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        state["scheduler"] = policy.scheduler.state_dict()
    return state


def _rng_object(topology):
    """This rank's generators, one object per rank."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", state, (topology.world_size,), (topology.rank,))


def _set_rng(state: dict) -> None:
    from megatron.core import tensor_parallel

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])

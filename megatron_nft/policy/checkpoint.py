"""Training checkpoints: Megatron's distributed format plus a manifest, written last. No manifest: not a checkpoint."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.errors import UserError

MANIFEST = "manifest.json"
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(directory: Path, policy, state: dict) -> None:
    """Collective. `state` must be JSON; everything else comes from the policy. An unfinished directory of the same name is replaced."""
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
        files = {f.name: f.stat().st_size for f in sorted(directory.iterdir())}
        manifest = {"layout": _layout(policy), "files": files, "state": state}
        temporary = directory / (MANIFEST + ".partial")
        temporary.write_text(json.dumps(manifest, indent=1))
        temporary.rename(directory / MANIFEST)
    dist.barrier()


def load(directory: Path, policy) -> dict:
    """Collective. Raises UserError if the directory is no complete checkpoint or lacks an entry; returns the state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    manifest = read_manifest(directory)
    wanted = _sharded_state(policy, loading=True)
    same_layout = manifest["layout"] == _layout(policy)
    if not same_layout:  # every rank's generator belongs to its place in the old layout
        del wanted["rng"]
    loaded = dist_checkpointing.load(wanted, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    policy.module.load_state_dict(loaded["model"], strict=True)
    if hasattr(policy, "optimizer"):
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _set_rng(loaded["rng"])
    return manifest["state"]


def read_manifest(directory: Path) -> dict:
    """The manifest of a complete checkpoint; UserError where it is missing or a file of it is missing or cut short."""
    file = directory / MANIFEST
    if not file.is_file():
        raise UserError(f"{directory} is no complete checkpoint ({MANIFEST} is missing)", "name a step_N directory that has one")
    manifest = json.loads(file.read_text())
    for name, size in manifest["files"].items():
        part = directory / name
        if not part.is_file() or part.stat().st_size != size:
            raise UserError(f"the checkpoint {directory} is damaged: {name} is missing or cut short", "use an older one")
    return manifest


def find(config: Config) -> Path | None:
    """The checkpoint a run continues from. Raises UserError for a run directory that is in use while `resume` is off."""
    run_dir = Path(config.run_dir)
    if config.resume:
        return newest(run_dir)
    if (run_dir / "config.yaml").exists():
        raise UserError(f"run_dir {run_dir} already holds a run", "choose another run_dir, or set resume=true to continue it")
    return None


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, passing over unfinished and damaged ones; None if there is none."""
    for directory in reversed(_numbered(run_dir)):
        try:
            read_manifest(directory)
            return directory
        except UserError:
            continue
    return None


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for directory in _numbered(run_dir)[:-keep]:
        shutil.rmtree(directory)


def _numbered(run_dir: Path) -> list[Path]:
    found = [d for d in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", d.name)]
    return sorted(found, key=lambda d: int(d.name.removeprefix("step_")))


def _layout(policy) -> dict:
    t = policy.topology
    return {"tensor": t.tensor_size, "pipeline": t.pipeline_size, "data": t.data_size}


def _sharded_state(policy, loading: bool) -> dict:
    model = policy.module.sharded_state_dict(metadata=METADATA)
    state = {"model": model, "rng": _rng_object(policy.topology)}
    if hasattr(policy, "optimizer"):
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=METADATA)
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

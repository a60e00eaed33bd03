"""Checkpoints: Megatron's distributed format, with the files that make it a model of its own (config, tokenizer), and a manifest."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft.errors import UserError
from megatron_nft.policy import manifest, optimizer, versions
from megatron_nft.policy.manifest import MANIFEST, best, damage, find, newest, prune, read_manifest, score_of, sweep
from megatron_nft.policy.saving import Files, Saved, Saver, failed
from megatron_nft.policy.topology import Topology

__all__ = [
    "MANIFEST", "Files", "Saved", "Saver", "best", "failed", "find", "load", "load_newest", "newest", "prune", "read_manifest", "score_of",
    "start", "sweep", "write_manifest",
]  # fmt: skip

_log = logging.getLogger(__name__)

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
EXTRA_STATE = "_extra_state/"  # in the name of what a layer keeps besides tensors: Transformer Engine's FP8 scales


def start(saver: Saver, directory: Path, policy, state: dict, then: Callable[[], None], more: Files | None = None) -> None:
    """Begin to save. Collective. `state` must be JSON; everything else comes from the policy. A directory of the same name is replaced.

    The manifest says what is there: the layout, the dtype of the weights, whether there is an optimizer, size and checksum of the
    files, `state`.
    """
    dtype = str(policy.module.config.params_dtype).removeprefix("torch.")
    about = {"layout": layout_of(policy.topology), "dtype": dtype, "optimizer": _trainable(policy), "state": state}

    def make_state() -> dict:
        return sharded_state(policy, loading=False) | {"content_metadata": dict(METADATA)}

    saver.start(directory, make_state, _live(policy), about, Path(policy.config.model.path), then, more)


def load_newest(directory: Path, policy) -> tuple[Path, dict]:
    """Load `directory`, a run's newest checkpoint, or the newest before it where that one is damaged; returns it and its state. Collective:
    the ranks share the reading of checksums. Raises UserError where every one of them is damaged."""
    run_dir, first_problem = directory.parent.parent, None
    candidate = _first_ranks(directory)
    while candidate is not None:
        problem = _agreed(_damage(candidate))
        if problem is None:
            return candidate, _load(candidate, policy)
        first_problem = first_problem or problem
        _log.warning("passing over a checkpoint: %s", problem)
        candidate = _first_ranks(newest(run_dir, before=candidate) if dist.get_rank() == 0 else None)
    raise UserError(first_problem, "choose another run_dir, or restore the files")


def write_manifest(directory: Path, files: list[Path], topology: Topology, dtype: torch.dtype, state: dict) -> None:
    """Of a checkpoint of weights alone, all of whose files are there."""
    about = {"layout": layout_of(topology), "dtype": str(dtype).removeprefix("torch."), "optimizer": False, "state": state}
    manifest.write(directory, about | {"files": manifest.secured(directory, files)})


def load(directory: Path, policy) -> dict:
    """Collective. Raises UserError if the directory is no complete checkpoint, is damaged or does not fill an entry; returns the state.

    A policy that is not trainable takes the weights only.
    """
    if problem := _agreed(_damage(directory)):
        raise UserError(problem, "use an older one")
    return _load(directory, policy)


def _damage(directory: Path) -> str | None:
    """What is wrong with the sizes of a checkpoint's files, or with the contents of this rank's share of them."""
    files = list(read_manifest(directory, checksums=False)["files"].items())
    files.sort(key=lambda entry: -entry[1][0])  # the large ones dealt evenly
    return damage(directory, dict(files[dist.get_rank() :: dist.get_world_size()]))


def _load(directory: Path, policy) -> dict:
    manifest = read_manifest(directory, checksums=False)
    if _trainable(policy) and not manifest["optimizer"]:
        raise UserError(f"{directory} holds weights without an optimizer", "name a checkpoint of a training run")
    layout = layout_of(policy.topology)
    if _trainable(policy):
        check_experts(directory, manifest["layout"], layout)
    wanted = sharded_state(policy, loading=True)
    if manifest["layout"] != layout:  # every rank's generator belongs to its place in the old layout
        wanted.pop("rng", None)
    named, modules = _names(wanted), _modules(policy)
    held = _fill_all(wanted, directory, weights_only=not _trainable(policy))
    new = {key: _without_extra_states(wanted[key], held) for key in modules}
    loaded = _read(wanted, directory)
    if lacking := _agreed(next((name for name in named if not _has(loaded, name)), None)):
        raise _lacks(directory, ".".join(map(str, lacking)))
    with versions.extra_states_taken():
        for key, module in modules.items():
            module.load_state_dict(loaded[key] | new[key], strict=True)
    if _trainable(policy):
        optimizer.load(policy.optimizer, loaded["optimizer"])
        policy.scheduler.num_steps = 0  # Megatron adds the checkpoint's count to it
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


# ---- every entry is there


def _fill_all(wanted: dict, directory: Path, weights_only: bool) -> set[str]:
    """The names of what the checkpoint holds. Raises UserError, on every rank, unless it has all that any rank wants, and nothing that no
    rank has a place for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    entries = extract_sharded_base(load_preprocess(wanted)[0])[0]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {_name(entry) for entry in nested_values(entries)})
    asked = set().union(*everyone)
    with _damage_reported(directory):
        held = {_name(entry) for entry in load_sharded_metadata(str(directory)).values()} if dist.get_rank() == 0 else None
    held = _first_ranks(held)
    if lacking := {name for name in asked - held if EXTRA_STATE not in name}:
        raise _lacks(directory, min(lacking))
    if left := {name for name in held - asked if not _may_be_left(name, weights_only)}:
        raise UserError(
            f"the checkpoint {directory} holds {min(left)}, for which this model has no place", "use the model it was made with"
        )
    return held


def _without_extra_states(state: dict, held: set[str]) -> dict[str, None]:
    """Take out of a model's wanted state the extra states that a checkpoint of another kind of layers does not hold; {name: None}, for
    layers that begin without."""
    new = [name for name, entry in state.items() if name.endswith("_extra_state") and _name(entry) not in held]
    for name in new:
        del state[name]
    return dict.fromkeys(new)


def _name(entry) -> str:
    """A tensor's key; an object's, with the number of its part."""
    return getattr(entry, "unique_key", entry.key)


def _may_be_left(name: str, weights_only: bool) -> bool:
    """Generators belong to a layout, extra states to a kind of layers, and the optimizer to training; the common part is checked apart."""
    return name.startswith(("rng/", "common_state/")) or EXTRA_STATE in name or (weights_only and "optimizer.state." in name)


def _names(state, at: tuple = ()) -> list[tuple]:
    """Paths of the entries of a state that have no keys of their own in the index: what all ranks have in common, and what is in this
    rank's generators."""
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory

    if isinstance(state, ShardedBase) and state.key == "rng":
        return [(*at, key) for key in state.data]
    if isinstance(state, ShardedBase | ShardedTensorFactory):
        return []
    if isinstance(state, dict | list):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return [name for key, value in pairs for name in _names(value, (*at, key))]
    return [at]


def _has(state, name: tuple) -> bool:
    for key in name:
        if not (key in state if isinstance(state, dict) else isinstance(state, list) and key < len(state)):
            return False
        state = state[key]
    return True


def _lacks(directory: Path, name: str) -> UserError:
    return UserError(f"the checkpoint {directory} lacks {name}", "use an older one, or the model it was made with")


def _agreed(problem):
    """The first rank's problem that has one, on every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((one for one in found if one is not None), None)


def _first_ranks(value):
    """The first rank's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _read(wanted: dict, directory: Path) -> dict:
    from megatron.core import dist_checkpointing

    with _damage_reported(directory):
        return dist_checkpointing.load(wanted, str(directory))


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


def _trainable(policy) -> bool:
    return hasattr(policy, "optimizer")


def _live(policy) -> list[torch.Tensor]:
    """Tensors that training changes in place: what a snapshot may not share."""
    tensors = [t for module in policy.modules for t in (*module.parameters(), *module.buffers())]
    if _trainable(policy):
        for one in policy.optimizer.chained_optimizers:
            groups = one.param_groups
            tensors += [p for group in groups for p in group["params"]]
            tensors += [t for state in one.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return tensors


def layout_of(t: Topology) -> dict:
    """The sizes of a topology, as the manifest has them."""
    layout = {"tensor": t.tensor_size, "pipeline": t.pipeline_size, "data": t.data_size, "context": t.context_size}
    return layout | {"virtual_pipeline": t.virtual_size, "expert": t.expert_size, "expert_tensor": t.expert_tensor_size}


def _modules(policy) -> dict:
    """The model's chunks by their keys in the state; in the files a tensor's name tells its layer, whatever the chunks."""
    return {f"model{i}" if len(policy.modules) > 1 else "model": module for i, module in enumerate(policy.modules)}


def sharded_state(policy, loading: bool) -> dict:
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

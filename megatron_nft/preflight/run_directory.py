"""The run directory before a run: that all nodes see the same one, and that what it holds is of this run."""

import secrets
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_nft.config import Config, known_keys
from megatron_nft.errors import UserError
from megatron_nft.policy import checkpoint
from megatron_nft.preflight.together import Place, gather, together

# What may differ between two starts of a run: where, on what, how fast and how long it runs, and what is told of it. All else is the run.
MAY_CHANGE = (
    "run_dir", "preset", "resume", "parallel", "evaluation", "checkpoint", "logging", "plan", "profile", "sft",
    "train.steps", "train.sampled_tokens", "train.tokens_per_micro_batch", "train.logprob_tokens_per_micro_batch", "train.offload",
    "train.recompute_granularity", "train.recompute_method", "train.recompute_num_layers", "train.recompute_modules",
    "train.watchdog_timeout", "train.watchdog_phases",
    "rollout.served", "rollout.save", "rollout.check_sync_interval", "rollout.logprob_tolerance", "rollout.tensor_parallel_size",
    "rollout.gpu_memory_utilization", "rollout.max_num_seqs", "rollout.max_num_batched_tokens", "rollout.cpu_kvcache_space",
    "rollout.enable_prefix_caching", "rollout.enable_chunked_prefill", "rollout.enforce_eager", "rollout.cudagraph_mode",
    "rollout.speculative_config", "rollout.update_weights_bucket_megabytes", "rollout.vllm",
    "optimizer.optimizer_cpu_offload", "optimizer.optimizer_offload_fraction",
    "reward.workers", "reward.time_limit", "reward.concurrency", "reward.memory_limit",
)  # fmt: skip
PATIENCE = 10  # seconds that a shared file system may take to show a node what another one wrote
SHOWN = 4  # settings that a refusal names
ABSENT = object()


def check_shared(run_dir: Path) -> None:
    """Raise UserError on all ranks where one of them does not see what the first one writes. Collective; leaves nothing."""
    made: list[Path] = []
    is_first = Place.here().rank == 0
    token = gather(secrets.token_hex(8))[0]
    file = run_dir / f".preflight-{token}"

    def write() -> None:
        if is_first:
            missing = [folder for folder in (run_dir, *run_dir.absolute().parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                made.append(folder)
            file.write_text(token)

    try:
        together(write)
        together(lambda: _wait_for(file, token, run_dir))
    finally:
        _remove(file, made)


def _remove(file: Path, made: list[Path]) -> None:
    """What `made` has by then, the innermost last. What cannot be removed stays: it is no fault of the run's, and other ranks wait."""
    with suppress(OSError):
        file.unlink()
    with suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()


def _wait_for(file: Path, token: str, run_dir: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (file.exists() and file.read_text() == token):
        if time.monotonic() > deadline:
            raise UserError(f"run_dir {run_dir} is not the one that rank 0 writes to", "name one on a file system that all nodes see")
        time.sleep(0.2)


def check_same_run(config: Config, changed_allowed: bool) -> str:
    """What a start would do in the run directory. Raises UserError where it holds a run whose settings were others."""
    run_dir = Path(config.run_dir)
    found, file, rows = checkpoint.find(config, "train"), run_dir / "config.yaml", run_dir / "metrics.jsonl"
    begun = found or (rows.is_file() and rows.stat().st_size)
    if begun and not changed_allowed and file.is_file() and (changed := changes(_saved(file), config)):
        named = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in list(changed.items())[:SHOWN])
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(f"run_dir {run_dir} holds a run with other settings: {named}{more}",
                        "give the settings it began with, choose another run_dir, or allow it with --changed")  # fmt: skip
    return f"goes on from {found.name}" if found else "begins anew, there is no checkpoint" if begun else "new"


def _saved(file: Path) -> dict:
    """The settings that a run began with. Raises UserError where the file has none."""
    try:
        saved = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{file} is damaged: it holds no settings",
                        "start with --changed, which does not compare them and writes it anew, or choose another run_dir")  # fmt: skip
    return saved


def changes(before: dict, config: Config) -> dict[str, tuple[object, object]]:
    """Settings that may not change within a run and did, by dotted key: what config.yaml has, and what is asked for. A setting that
    config.yaml does not know, which another version of this program wrote, is passed over."""
    now, differing = asdict(config), {}
    for key in known_keys():
        old, new = _value(before, key), _value(now, key)
        if old != new and old is not ABSENT and not _may_change(key):
            differing[key] = old, new
    return differing


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _value(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part, ABSENT) if isinstance(tree, dict) else ABSENT
    return tree

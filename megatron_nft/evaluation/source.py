"""What is evaluated: a Hugging Face directory, a training run, a checkpoint of ours, or one that Megatron-LM saved."""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.logbook import check_writable
from megatron_nft.policy import checkpoint, manifest
from megatron_nft.weights import check_companions, copy_companions, find_iteration, is_checkpoint
from megatron_nft.weights.torch_dist import BACKEND, LATEST

LOOKS, PIECE = 64, 4096  # into a file of weights, for its fingerprint: places, and bytes at each


@dataclass(frozen=True)
class Source:
    """A model to be evaluated."""

    path: Path  # what tokenizer and engine read
    given: Path  # what the user would call it
    name: str  # of its results

    def fingerprint(self) -> str:
        """A hash of what the files of weights hold at some places, which is another one for weights of another step or model, and the same
        for a copy."""
        digest = hashlib.sha256()
        for file in sorted(file for file in self.path.iterdir() if file.suffix in (".safetensors", ".distcp")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                for place in range(LOOKS):
                    opened.seek(max(size - PIECE, 0) * place // (LOOKS - 1))
                    digest.update(opened.read(PIECE))
        return digest.hexdigest()[:16]


@contextmanager
def opened(config: Config) -> Iterator[Source]:
    """The model at config.model.path, which may be any of these. While this lasts config.model.path is what tokenizer and engine can read.

    What Megatron-LM saved has no config and no tokenizer: it is read through a directory of links to its files beside those of
    evaluation.hf_config, which is removed at the end. Raises UserError for a path that holds no model.
    """
    check_writable(config.run_dir)
    given = find(Path(config.model.path), config.evaluation.checkpoint)
    with ExitStack() as closing:
        path = given
        if _is_megatron_lm(given):
            # one for each rank, and among the system's temporary files, which go by themselves where a process is killed
            links = closing.enter_context(tempfile.TemporaryDirectory(prefix="megatron-nft-model-"))
            path = _linked(given, config.evaluation.hf_config, Path(links))
        config.model.path = str(path)
        yield Source(path, given, config.evaluation.name or name_of(given))


def find(path: Path, wanted: str) -> Path:
    """The directory that holds the model: the path itself, the checkpoint of a run that `wanted` asks for (best, newest, step_N), the
    newest iteration of Megatron-LM's. Raises UserError where there is none."""
    if not path.is_dir():
        raise UserError(f"no model directory at {path}", "set model.path to a Hugging Face directory, a run directory or a checkpoint")
    if (path / LATEST).is_file():
        return find_iteration(path)
    if is_checkpoint(path) or (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        return path
    return _of_run(path, wanted)


def _of_run(run_dir: Path, wanted: str) -> Path:
    if wanted not in ("best", "newest"):
        chosen = run_dir / "checkpoints" / wanted
        if not chosen.is_dir():
            names = ", ".join(directory.name for directory in manifest.numbered(run_dir / "checkpoints")) or "none"
            raise UserError(f"{run_dir} has no checkpoint {wanted}", f"set evaluation.checkpoint to one that is there: {names}")
        return chosen
    best = checkpoint.best(run_dir, 1) if wanted == "best" else []
    found = best[0] if best else checkpoint.newest(run_dir)
    if found is None and (run_dir / "huggingface" / "config.json").is_file():
        return run_dir / "huggingface"
    if found is None:
        raise UserError(f"{run_dir} has no complete checkpoint", "wait for the first save, or name a model directory")
    return found


def name_of(directory: Path) -> str:
    """A name that tells this model from others: Qwen2.5-7B, my_run-step_20, my_run-huggingface, pretrain-iter_0000500."""
    directory = directory.resolve()
    above = directory.parent.parent if directory.parent.name == "checkpoints" else directory.parent
    plain = not re.fullmatch(r"step_\d+|iter_\d+|release|huggingface", directory.name)
    return re.sub(r"[^\w.+@=-]|^[^\w]+", "_", directory.name if plain else f"{above.name}-{directory.name}")


def _is_megatron_lm(directory: Path) -> bool:
    return (directory / BACKEND).is_file() and not (directory / "config.json").is_file()


def _linked(directory: Path, hf_config: str | None, folder: Path) -> Path:
    """A checkpoint of ours, in `folder`, out of Megatron-LM's files and what hf_config has besides weights."""
    find_iteration(directory)  # refuses what is no torch_dist
    if hf_config is None or not (Path(hf_config) / "config.json").is_file():
        raise UserError(f"{directory} has no config.json, as Megatron-LM saves its checkpoints",
                        "set evaluation.hf_config to a directory with the model's config.json and tokenizer")  # fmt: skip
    check_companions(Path(hf_config))
    copy_companions(Path(hf_config), folder)
    for file in directory.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    manifest.write(folder, {"layout": {}, "dtype": "", "optimizer": False, "files": {}, "state": {}})
    return folder

"""The directory side of checkpoints: what is complete, what is damaged, which are kept. Files only, no model.

A save is written to a hidden directory beside its final name and takes that name when all is in; the manifest, written last, has the
size and the checksum of every other file, and its own checksum. No manifest: not a checkpoint.
"""

import json
import logging
import math
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.weights import MANIFEST, read_json

_log = logging.getLogger(__name__)

CHUNK = 2**24  # bytes read at a time
_FIELDS = {"layout", "dtype", "optimizer", "files", "state"}
_OTHER = "use an older checkpoint"
_OWN = "checksum"  # of the manifest's other fields
Fingerprint = list[int]  # size in bytes, CRC-32


def fingerprint(file: Path) -> Fingerprint:
    """Size in bytes and CRC-32, in chunks."""
    size = checksum = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return [size, checksum]


def secured(directory: Path, files: Iterable[Path]) -> dict[str, Fingerprint]:
    """Fingerprints of files that were just written, by their names relative to `directory`; they are on the disk when this returns."""
    found = {}
    for file in files:
        sync(file)
        found[str(file.relative_to(directory))] = fingerprint(file)
    return found


def sync(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hidden(directory: Path) -> Path:
    """A new name beside `directory`, of one attempt to write it alone."""
    return directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")


def write(directory: Path, manifest: dict) -> None:
    """Write the manifest, in one move: what makes a directory a checkpoint."""
    partial = directory / (MANIFEST + ".partial")
    content = {name: value for name, value in manifest.items() if name != _OWN}
    partial.write_text(json.dumps(content | {_OWN: _own_checksum(content)}, indent=1))
    sync(partial)
    partial.rename(directory / MANIFEST)


def _own_checksum(content: dict) -> int:
    """CRC-32 of what JSON makes of a manifest: the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(content).encode())


def publish(written: Path, manifest: dict, directory: Path) -> None:
    """Write the manifest into the hidden directory and give it its final name, in whose place a directory that has it is removed.

    A power cut leaves one of the two complete under the final name, or, between two renames, none.
    """
    write(written, manifest)
    for folder in (written, *(path for path in written.rglob("*") if path.is_dir())):
        sync(folder)
    replaced = hidden(directory)
    if directory.exists():
        directory.rename(replaced)
    written.rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_manifest(directory: Path, checksums: bool = True) -> dict:
    """The manifest of a complete checkpoint; UserError where it is missing or changed, or a file of it is.

    checksums=False compares sizes only, which reads nothing but the manifest.
    """
    file = directory / MANIFEST
    if not file.is_file():
        what = f"is no complete checkpoint ({MANIFEST} is missing)" if directory.is_dir() else "is no directory"
        raise UserError(f"{directory} {what}", f"name {newest(directory) or 'a step_N directory that has one'}")
    manifest = read_json(file, mend=f"{_OTHER}, or, of a converted model, convert it again")
    written = manifest.pop(_OWN, None)  # none in what is no manifest of ours, or is damaged right there
    mend = "convert the model again" if _is_converted(manifest) else _OTHER
    if missing := _FIELDS - manifest.keys():
        raise UserError(f"{file} lacks {min(missing)}", mend)
    if written != _own_checksum(manifest):
        raise UserError(f"the checkpoint {directory} is damaged: {MANIFEST} is not what was written", mend)
    if found := damage(directory, manifest["files"], checksums):
        raise UserError(found, mend)
    return manifest


def check_weights(directory: Path) -> None:
    """Raise UserError for a checkpoint that a model cannot start from: not complete, or with a file of another size; of the small files
    (config, index) also with other contents. Reading the tensors checks those that are read."""
    small = {name: mark for name, mark in read_manifest(directory, checksums=False)["files"].items() if not name.endswith(".distcp")}
    if found := damage(directory, small):
        raise UserError(found, "use another one, or convert it again")


def _is_converted(manifest: dict) -> bool:
    """Whether a checkpoint comes from a Hugging Face model, and not from training."""
    return isinstance(manifest.get("state"), dict) and "dtypes" in manifest["state"]


def damage(directory: Path, files: dict[str, Fingerprint], checksums: bool = True) -> str | None:
    """What is wrong with the first file that is not as its fingerprint says; None where all are."""
    for name, (size, checksum) in files.items():
        part = directory / name
        if not part.is_file():
            return f"the checkpoint {directory} is damaged: {name} is missing"
        same = part.stat().st_size == size
        if same and checksums:
            same = fingerprint(part) == [size, checksum]
        if not same:
            return f"the checkpoint {directory} is damaged: {name} is not what was written"
    return None


def find(config: Config, command: str) -> Path | None:
    """The checkpoint a run of `command` continues from (its state names the command); None for a new run.

    Compares sizes only, on every rank alike: checksums are for the ranks to share when it is loaded. Raises UserError for a run directory
    that is in use while `resume` is off, and for one whose checkpoints are all damaged: to begin anew would overwrite what is there.
    """
    run_dir = Path(config.run_dir)
    if config.resume:
        found = newest(run_dir)
        if found is None and (damaged := numbered(run_dir / "checkpoints")):
            read_manifest(damaged[-1], checksums=False)  # raises: to begin anew would overwrite what is there
        if found and (other := read_json(found / MANIFEST)["state"].get("command")) != command:
            raise UserError(f"run_dir {run_dir} holds a run of `{other}`, not of `{command}`", "choose another run_dir")
        return found
    if (run_dir / "config.yaml").exists():
        raise UserError(f"run_dir {run_dir} already holds a run", "choose another run_dir, or set resume=true to continue it")
    return None


def newest(run_dir: Path, before: Path | None = None) -> Path | None:
    """The newest checkpoint of a run (older than `before`) whose files have the sizes they should have, passing over unfinished and
    damaged ones; None if there is none."""
    for directory in reversed(numbered(run_dir / "checkpoints")):
        if before is not None and step_of(directory) >= step_of(before):
            continue
        try:
            read_manifest(directory, checksums=False)
            return directory
        except UserError as error:
            if (directory / MANIFEST).exists():
                _log.warning("passing over a checkpoint: %s", error)
    return None


def prune(run_dir: Path, keep: int, keep_best: int = 0) -> None:
    """Delete all checkpoints but the newest `keep` and the `keep_best` best by their scores, what was left unfinished, and what is damaged:
    that counts for neither. Where no checkpoint is complete nothing is deleted."""
    sweep(run_dir)
    complete = [directory for directory in numbered(run_dir / "checkpoints") if _is_whole(directory)]
    if not complete:
        return
    kept = {*complete[-keep:], *best(run_dir, keep_best)}
    for directory in numbered(run_dir / "checkpoints"):
        if directory not in kept:
            shutil.rmtree(directory)


def _is_whole(directory: Path) -> bool:
    """Whether a checkpoint's files have the sizes they should have."""
    try:
        read_manifest(directory, checksums=False)
    except UserError:
        return False
    return True


def sweep(run_dir: Path) -> None:
    """Delete what killed saves left under hidden names. Only where no save of this run is under way."""
    for leftover in (run_dir / "checkpoints").glob(".step_*.partial"):
        shutil.rmtree(leftover)


def best(run_dir: Path, count: int) -> list[Path]:
    """The checkpoints with the highest scores in their states, best first; of equals the newest first. Those without a score are none."""
    scored = [(score_of(directory), step_of(directory), directory) for directory in numbered(run_dir / "checkpoints")]
    ranked = sorted((entry for entry in scored if entry[0] is not None), reverse=True)
    return [directory for _, _, directory in ranked[:count]]


def score_of(directory: Path) -> float | None:
    """The score that was saved with a checkpoint; None where there is none, or no manifest that tells."""
    try:
        score = read_manifest(directory, checksums=False)["state"].get("score")
    except UserError:
        return None
    return score if score is not None and math.isfinite(score) else None


def numbered(checkpoints: Path) -> list[Path]:
    """The step_N directories, by N."""
    return sorted((d for d in checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", d.name)), key=step_of)


def step_of(directory: Path) -> int:
    """N of step_N."""
    return int(directory.name.removeprefix("step_"))

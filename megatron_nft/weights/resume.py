"""Directories that are written file by file: complete or not there, and gone on with after a kill.

`OUT` is written as `.OUT.partial` beside it and renamed at the end. In there, `journal/` says what it is made of (names, sizes and times of
the source's files, and the options) and which files are finished; all of it is left by a killed process. The same command goes on from
there; with another source it starts anew. A full disk, or one with too little room, leaves the finished files, too, and says so; any
other error leaves nothing. A lock in the journal keeps two conversions from writing one directory.
"""

import base64
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_nft.errors import UserError, os_error_behind
from megatron_nft.locks import exclusive

JOURNAL = "journal"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
SPARE = 16 * 2**20  # bytes: config, tokenizer, indices


class NoRoom(UserError):
    """The disk is full, or will be."""


class InUse(UserError):
    """Another process writes the directory."""


def check_vacant(directory: Path) -> None:
    """Raise UserError unless nothing, or an empty directory, is there."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already", "choose a new directory, or remove it")


def partial_of(directory: Path) -> Path:
    """Where a directory is written."""
    return directory.with_name(f".{directory.name}.partial")


def stamps(directories: Iterable[Path]) -> list:
    """Name, size and time of change of every file in the directories: what tells whether a source is the one it was."""
    files = sorted(file for directory in directories for file in directory.iterdir() if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class Unfinished:
    """A directory that is being written, and its journal."""

    def __init__(self, directory: Path):
        """directory: the hidden one."""
        self.directory, self._journal = directory, directory / JOURNAL

    def finished(self, name: str) -> bytes | None:
        """What was noted of a file when it was finished; None for one that is not."""
        note, file = self._journal / f"{name}.json", self.directory / name
        if not note.is_file() or not file.is_file():
            return None
        content = json.loads(note.read_text())
        return base64.b64decode(content["note"]) if content["size"] == file.stat().st_size else None

    def finish(self, name: str, note: bytes = b"") -> None:
        """Note that a file is complete."""
        content = {"size": (self.directory / name).stat().st_size, "note": base64.b64encode(note).decode()}
        _write_whole(self._journal / f"{name}.json", json.dumps(content))

    def finished_names(self) -> list[str]:
        """Files that need not be written again."""
        names = (note.name.removesuffix(".json") for note in sorted(self._journal.glob("*.json")))
        return [name for name in names if self.finished(name) is not None]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, and keep other processes out of it. Raises InUse where one is in there."""
        self._journal.mkdir(parents=True, exist_ok=True)
        in_use = InUse(f"another conversion is writing {self.directory}", "wait for its end, or choose another directory")
        with exclusive(self._journal / "lock", in_use):
            yield

    def begin(self, source: dict) -> None:
        """Go on with what is there if it was made of this source, or else start anew."""
        told = self._journal / "source"
        made_of = json.dumps(source, indent=1)
        if not (told.is_file() and told.read_text() == made_of):
            for note in self._journal.glob("*.json"):
                note.unlink()
            _write_whole(told, made_of)
        self.drop_unfinished()

    def drop_unfinished(self) -> None:
        """Remove all but the finished files and the journal."""
        kept = {JOURNAL, *self.finished_names()}
        for path in self.directory.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def files(self) -> list[Path]:
        """Every file that will stay."""
        return sorted(file for file in self.directory.rglob("*") if file.is_file() and self._journal not in file.parents)

    def close(self) -> None:
        """The directory is complete."""
        shutil.rmtree(self._journal)


@contextmanager
def resumable(directory: Path, source: dict, nbytes: int) -> Iterator[Unfinished]:
    """A directory to write into; it takes the place of `directory`, where nothing may be, at the end of the block.

    source: what it is made of, as JSON. nbytes: how large it will be. Raises UserError where the disk has not that much room, or is full
    after all, and where nothing can be written.
    """
    check_vacant(directory)
    unfinished = Unfinished(partial_of(directory))
    try:
        with unfinished.locked():
            unfinished.begin(source)
            _check_room(directory, unfinished, nbytes)
            yield unfinished
            unfinished.close()
            if directory.exists():
                directory.rmdir()
            unfinished.directory.rename(directory)
    except InUse:
        raise
    except Exception as error:
        reason = None if isinstance(error, UserError) else os_error_behind(error)
        full = isinstance(error, NoRoom) or (reason is not None and reason.errno in NO_ROOM)
        kept = unfinished.finished_names() if full else []
        if kept:
            unfinished.drop_unfinished()
        else:
            shutil.rmtree(unfinished.directory, ignore_errors=True)
        if full:
            problem = f"no room to write {directory} ({reason.strerror})" if reason else error.problem
            raise NoRoom(problem, _mend(directory, kept)) from error
        if reason is not None and reason.errno in NOT_WRITABLE and _on_the_way(Path(reason.filename or ""), unfinished.directory):
            raise UserError(f"{directory} cannot be written ({reason.strerror})", "choose a directory that can") from error
        raise


def _on_the_way(path: Path, directory: Path) -> bool:
    """Whether a path is the directory, above it or in it."""
    return path == directory or path in directory.parents or directory in path.parents


def _mend(directory: Path, kept: list[str]) -> str:
    if not kept:
        return "make room and run the same command again, or choose a directory on another disk"
    partial = partial_of(directory)
    return (f"make room and run the same command again: it goes on after the {len(kept)} files that are finished in {partial}; "
            "or remove that directory")  # fmt: skip


def _check_room(directory: Path, unfinished: Unfinished, nbytes: int) -> None:
    done = sum((unfinished.directory / name).stat().st_size for name in unfinished.finished_names())
    need, free = nbytes - done + SPARE, shutil.disk_usage(unfinished.directory).free
    if need > free:
        problem = f"{directory} needs {need / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free on its disk"
        raise NoRoom(problem, _mend(directory, unfinished.finished_names()))


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".unfinished")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)

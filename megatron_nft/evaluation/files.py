"""Results that take the place of others: set aside or swapped, so that nothing is lost."""

import itertools
import shutil
from pathlib import Path


def set_aside(*paths: Path) -> None:
    """Move those of these files and directories that are there to NAME.1, NAME.2 ..., all with the first number that is free for all."""
    there = [path for path in paths if path.exists()]
    for path, name in zip(there, free_names(*there), strict=True):
        path.rename(name)


def free_names(*paths: Path) -> list[Path]:
    """NAME.1, NAME.2 ... of each, all with the first number that none of them has."""
    numbered = ([path.with_name(f"{path.name}.{number}") for path in paths] for number in itertools.count(1))
    return next(names for names in numbered if not any(name.exists() for name in names))


def in_work(directory: Path) -> Path:
    """Where what is to take a directory's place is made, for `swap`."""
    return directory.with_name(f".{directory.name}.new")


def swap(directory: Path) -> None:
    """Put in_work(directory) in its place. A process that is killed in between leaves the old one to `recover`."""
    old = _old(directory)
    directory.rename(old)
    in_work(directory).rename(directory)
    shutil.rmtree(old)


def recover(directory: Path) -> None:
    """After a process that was killed: the directory is the old one, or the new one, and nothing else is left."""
    if _old(directory).exists() and not directory.exists():
        _old(directory).rename(directory)
    for left in (_old(directory), in_work(directory)):
        shutil.rmtree(left, ignore_errors=True)


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")

"""Files of results: whole or not there, and never written over where something would be lost."""

import itertools
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a text file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def set_aside(path: Path) -> Path | None:
    """Move a file or directory to the first free of NAME.1, NAME.2 ...; its new path, None where there is nothing."""
    return path.rename(free_name(path)) if path.exists() else None


def free_name(path: Path) -> Path:
    """The first of NAME.1, NAME.2 ... that is not there."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())

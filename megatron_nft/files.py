"""Files that are written complete or not at all: under a temporary name, then renamed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a text file; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def write_parquet(path: Path, rows: list[dict], schema) -> None:
    """Write rows as a table with this pyarrow schema."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), part)
    os.replace(part, path)


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")

"""Files that are written complete or not at all: under a temporary name, then renamed. And JSON that a user gave, read."""

import json
import os
from pathlib import Path

from megatron_nft.errors import UserError

AGAIN = "download or copy the model again"


def read_json(file: Path, mend: str = AGAIN) -> dict:
    """A JSON object. Raises UserError for anything else in the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error})", mend) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object", mend)
    return content


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

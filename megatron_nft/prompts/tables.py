"""Raw rows of a data set, one after the other: a .jsonl, .json or .parquet file, a directory of such, or a set on the Hugging Face hub."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.config import DATA_SUFFIXES, DatasetConfig
from megatron_nft.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BATCH = 1024  # rows that are in memory at a time, of parquet and of the hub


@dataclass(frozen=True)
class Wanted:
    """Which columns are read; dots reach into structures."""

    needed: Sequence[str]  # a table without one of them is read as a whole, for the caller to tell what it has
    optional: Sequence[str] = ()


def read_table(dataset: DatasetConfig, columns: Wanted) -> Iterator[dict[str, Any]]:
    """Rows as mappings, at most dataset.limit. Raises UserError for what cannot be read, at the row that shows it. Lines of JSON have
    all their columns, whatever is wanted."""
    path = Path(dataset.path)
    if path.suffix in DATA_SUFFIXES:
        if not path.is_file():
            raise UserError(f"no data file at {path}", "mend the path (it is relative to the directory the program starts in)")
        rows = read_parquet(path, columns) if path.suffix == ".parquet" else read_json(path)
    elif path.is_file():
        raise UserError(f"{path} is no data file of a known kind", f"give a file that ends in {', '.join(DATA_SUFFIXES)}")
    elif not path.exists() and not _HUB_NAME.fullmatch(dataset.path):
        raise UserError(f"no data set at {path}", f"give a file that ends in {', '.join(DATA_SUFFIXES)}, or a name on the hub, owner/name")
    else:
        rows = _read_hub(dataset, columns)
    return islice(rows, dataset.limit)


def read_json(path: Path) -> Iterator[dict[str, Any]]:
    """One object a line of a .jsonl file (empty lines do not count), or the one list of objects that any other file is."""
    if path.suffix == ".jsonl":
        yield from _read_lines(path)
        return
    data = path.read_bytes()
    rows = _parse(_decode(data, path, 0), str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is no list of JSON objects", "write [{...}, ...], or one object a line into a .jsonl file")
    yield from rows


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, start)
            start += len(line)
            if text.strip():
                row = _parse(text, f"line {number} of {path}")
                if not isinstance(row, dict):
                    raise UserError(f"line {number} of {path} is no JSON object", 'write one {"problem": ..., "answer": ...} a line')
                yield row


def _decode(data: bytes, path: Path, start: int) -> str:
    """start: where in the file the data begins."""
    try:
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {start + error.start})", "convert it, e.g. with iconv -t UTF-8") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of more digits than Python reads
        raise UserError(f"{where} is not valid JSON ({error})", "mend or remove it") from None


def read_parquet(path: Path, columns: Wanted) -> Iterator[dict[str, Any]]:
    """Batch by batch, so that a file may be larger than memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            chosen = _chosen(columns, file.schema_arrow)
            for batch in file.iter_batches(_BATCH, columns=chosen):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)})", "download or write it again") from None


def _read_hub(dataset: DatasetConfig, columns: Wanted) -> Iterator[dict[str, Any]]:
    """By the `datasets` library, from its cache when there is no network; also a local directory of data files."""
    import pyarrow
    from datasets import exceptions, load_dataset

    try:
        table = load_dataset(dataset.path, dataset.subset, split=dataset.split)
        chosen = _chosen(columns, table.features.arrow_schema)
        table = table if chosen is None else table.select_columns(list(dict.fromkeys(name.partition(".")[0] for name in chosen)))
        for batch in table.with_format("arrow").iter(_BATCH):
            yield from batch.to_pylist()
    except (OSError, ValueError, RuntimeError, exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot load the data set {dataset.path}, split {dataset.split} ({first_line(error)})",
                        "check name, subset, split and network, or give a local file") from None  # fmt: skip


def _chosen(columns: Wanted, schema: "pyarrow.Schema") -> list[str] | None:
    """Those of the columns that a table has; None for all."""
    if not all(_has(schema, name) for name in columns.needed):
        return None
    return [*columns.needed, *(name for name in columns.optional if _has(schema, name))]


def _has(schema: "pyarrow.Schema", name: str) -> bool:
    if name in schema.names:
        return True
    here: Any = schema
    for part in name.split("."):
        found = here.get_field_index(part) if hasattr(here, "get_field_index") else -1  # a schema or a structure
        if found < 0:
            return False
        here = here.field(found).type
    return True

"""The rows of a data set: a .jsonl, .json or .parquet file, or a set on the Hugging Face hub, with its columns under one name each."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_nft.config import DATA_SUFFIXES, DatasetConfig
from megatron_nft.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ABSENT = object()


def load_rows(dataset: DatasetConfig) -> list[dict[str, Any]]:
    """The rows as {id, question, answer} (strings without the spaces around them; "" where the data has null), where the data has
    them also `solution`, and `turns`, the chat before the question, as a list of {role, content}.

    The id is the column "id", else extra_info.index, else the row's number from 0. Raises UserError for a file that cannot be
    read, a missing column, a column that holds something else than text or a number, and two questions with one id.
    """
    rows = [_row(raw, number, dataset) for number, raw in enumerate(_read(dataset))]
    questions: dict[str, str] = {}
    for row in rows:
        if questions.setdefault(row["id"], row["question"]) != row["question"]:
            raise UserError(f"two questions of {dataset.path} have the id {row['id']!r}", "make the ids unique, or remove the column")
    return rows


def _read(dataset: DatasetConfig) -> list[dict[str, Any]]:
    """Raw rows, at most dataset.limit."""
    path = Path(dataset.path)
    if path.suffix in DATA_SUFFIXES:
        if not path.is_file():
            raise UserError(f"no data file at {path}", "mend the path (it is relative to the directory the program starts in)")
        read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[path.suffix]
        return read(path)[: dataset.limit]
    if path.is_file():
        raise UserError(f"{path} is no data file of a known kind", f"give a file that ends in {', '.join(DATA_SUFFIXES)}")
    if not path.exists() and not _HUB_NAME.fullmatch(dataset.path):
        raise UserError(f"no data set at {path}", f"give a file that ends in {', '.join(DATA_SUFFIXES)}, or a name on the hub, owner/name")
    return _read_hub(dataset)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})", "convert it, e.g. with iconv -t UTF-8") from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object a line; empty lines do not count."""
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            rows.append(_parse(line, f"line {number} of {path}"))
            if not isinstance(rows[-1], dict):
                raise UserError(f"line {number} of {path} is no JSON object", 'write one {"problem": ..., "answer": ...} a line')
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    """One list of objects."""
    rows = _parse(_read_text(path), str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is no list of JSON objects", "write [{...}, ...], or one object a line into a .jsonl file")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error})", "mend or remove it") from None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})", "download or write it again") from None


def _read_hub(dataset: DatasetConfig) -> list[dict[str, Any]]:
    """By the `datasets` library, from its cache when there is no network; also a local directory of data files."""
    from datasets import load_dataset

    try:
        table = load_dataset(dataset.path, dataset.subset, split=dataset.split)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the data set {dataset.path}, split {dataset.split} ({str(error).splitlines()[0]})",
                        "check name, subset, split and network, or give a local file") from None  # fmt: skip
    return (table if dataset.limit is None else table.select(range(min(dataset.limit, len(table))))).to_list()


def _row(raw: dict[str, Any], number: int, dataset: DatasetConfig) -> dict[str, Any]:
    """One raw row under the common names."""
    where = f"row {number} of {dataset.path}"
    question, turns = _question(_column(raw, dataset.question, where), f"column {dataset.question} in {where}")
    ids = (_reach(raw, "id"), _reach(raw, "extra_info.index"), number)
    row = {
        "id": str(next(value for value in ids if value is not _ABSENT and value is not None)),
        "question": question,
        "answer": _text(_column(raw, dataset.answer, where), f"column {dataset.answer} in {where}"),
    }
    solution = _reach(raw, dataset.solution)
    if solution is not _ABSENT and solution is not None:
        row["solution"] = _text(solution, f"column {dataset.solution} in {where}")
    return row | ({"turns": turns} if turns else {})


def _question(value: Any, where: str) -> tuple[str, list[dict[str, str]]]:
    """The question, and the turns before it where the column holds a chat."""
    if not isinstance(value, list):
        return _text(value, where), []
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        raise UserError(f"{where} is a list, but not of {{role, content}}", "let it hold a text, or a chat")
    if not value or value[-1]["role"] != "user":
        raise UserError(f"{where} holds a chat that does not end in a turn of the user", "cut what comes after the question")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in value[:-1]]
    return _text(value[-1]["content"], where), turns


def _text(value: Any, where: str) -> str:
    """A text or a number as text; a list of one of them counts as that one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} holds a {type(value).__name__}", "name a column that holds a text or a number")
    return str(value).strip()


def _column(raw: dict[str, Any], name: str, where: str) -> Any:
    """The value of a column that must be there."""
    value = _reach(raw, name)
    if value is _ABSENT:
        raise UserError(f"{where} has no column {name}; it has {', '.join(_names(raw))}",
                        "set question and answer of the data set to its columns")  # fmt: skip
    return value


def _reach(raw: dict[str, Any], name: str) -> Any:
    """The value of a column; dots reach into structures."""
    if name in raw:
        return raw[name]
    value: Any = raw
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _names(raw: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """The names of all columns, those within structures with dots."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield prefix + key

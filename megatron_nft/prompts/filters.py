"""Which rows of the data become prompts: with a gold, each question once, no contradictions, none that is excluded."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_nft.errors import UserError

_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
_INTEGER = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")


@dataclass
class _Question:
    """All rows of one question, of which the first is kept."""

    first: dict[str, Any]
    golds: set[frozenset[str]] = field(default_factory=set)
    rows: int = 0
    excluded: bool = False


def filter_rows(rows: Iterable[dict[str, Any]], excluded: set[str] | None = None) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows with a question and a gold, each question once, and the counts of the others; excluded: ids, as set/row id.

    Equal are questions that differ in spaces alone. A question whose rows have different golds is dropped with all of them. Only one
    row a question is kept in memory. Raises UserError where none of the ids that are excluded is there.
    """
    dropped = {"empty": 0, "conflicting": 0, "duplicate": 0} | ({} if excluded is None else {"excluded": 0})
    questions: dict[str, _Question] = {}
    for row in rows:
        key = _key(row["question"])
        if not key or not row["answer"]:
            dropped["empty"] += 1
            continue
        question = questions.setdefault(key, _Question(row))
        question.rows += 1
        question.golds.add(frozenset(map(plain_gold, (row["answer"], *row.get("alternatives", ())))))
        question.excluded |= bool(excluded) and f"{row['source']}/{row['id']}" in excluded
    kept = []
    for question in questions.values():
        if question.excluded:
            dropped["excluded"] += question.rows
        elif len(question.golds) > 1:
            dropped["conflicting"] += question.rows
        else:
            dropped["duplicate"] += question.rows - 1
            kept.append(question.first)
    if excluded and not dropped["excluded"]:
        raise UserError(f"none of the {len(excluded)} ids of data.exclude is in the training data", "write them as set/row id, one a line")
    return kept, dropped


@lru_cache(maxsize=1 << 15)  # published sets have every row many times
def _key(question: str) -> str:
    """What makes two questions equal: their text, however it is spaced."""
    return " ".join(question.split())


@lru_cache(maxsize=1 << 15)
def plain_gold(text: str) -> str:
    r"""A gold as two golds are compared for being the same: without spaces, dollar signs, \left, \right, \, and \!, thousands commas,
    an integer's leading zeros and .0; \dfrac and \tfrac are \frac."""
    text = re.sub(r"\\left|\\right|\\[,!;: ]|[$\s]", "", text)
    text = _THOUSANDS.sub("", re.sub(r"\\[dt]frac", r"\\frac", text))
    found = _INTEGER.fullmatch(text)
    return found[1].strip("+") + found[2] if found else text


def read_excluded(path: str | None) -> set[str] | None:
    """The ids of data.exclude, one a line. Raises UserError where it is no text file, or empty."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"data.exclude: no text file at {path}", "give a file of prompt ids, one a line, or leave it out") from None
    ids = {line.strip() for line in lines} - {""}
    if not ids:
        raise UserError(f"data.exclude: {path} holds no id", "give one a line, or leave it out")
    return ids

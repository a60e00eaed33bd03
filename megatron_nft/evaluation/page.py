"""The evaluations of a run directory as the report's page shows them."""

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers, compare, tables

OF_A_KIND = 2  # right answers, and others, shown of a set
LONGEST_TEXT = 4000  # characters shown of an answer
_log = logging.getLogger(__name__)
_SHOWN = ["set", "kind", "question", "answer", "response", "verdict", "outcome", "finish_reason", "length"]


@dataclass(frozen=True)
class Shown:
    """One evaluation. The tables' first rows are their headers."""

    name: str
    label: str
    seed: int
    tables: list[tuple[str, list[list[str]]]]  # with their titles
    sets: list[str]
    answers: Path

    @cached_property
    def examples(self) -> list[tuple[str, list[dict], list[dict]]]:
        """Of each set right answers and others, with columns of the saved answers. Read when they are asked for first."""
        return _examples(self.answers, self.sets)


def evaluations(run_dir: str | Path) -> list[Shown]:
    """Those that `megatron-nft evaluate` wrote, by name; validations of a training are its curves."""
    folder = Path(run_dir) / "evaluations"
    names = [name for name in compare.found_in(folder) if not re.fullmatch(r"step_\d+", name)]
    return [shown for name in names if (shown := _shown(folder, name)) is not None]


def _shown(folder: Path, name: str) -> Shown | None:
    try:
        summary = compare.read(folder / f"{name}.json")
    except UserError:  # another kind of file
        return None
    if not all("outcomes" in result and "reward" in result["settings"] for result in summary["sets"].values()):
        return None
    parts = [
        ("Accuracy", [tables.header(summary), *tables.rows(summary)]),
        ("pass@j", [tables.pass_header(summary), *tables.pass_rows(summary)]),
        ("Answers", [tables.ANSWERS_HEADER, *tables.answer_rows(summary)]),
    ]
    parts = [(title, table) for title, table in parts if len(table) > 1]
    return Shown(name, summary["label"], summary["seed"], parts, list(summary["sets"]), folder / f"{name}.answers")


def _examples(directory: Path, sets: list[str]) -> list[tuple[str, list[dict], list[dict]]]:
    """The first right and the first other answers of each set, of different problems, greedy ones before sampled ones. Files that cannot be
    read are passed over."""
    chosen: dict[str, tuple[dict, dict]] = {name: ({}, {}) for name in sets}
    for file in answers.files(directory):
        for row in _rows(file):
            if row["set"] in chosen:
                own = chosen[row["set"]][row["outcome"] != "right"]
                if len(own) < OF_A_KIND:
                    own.setdefault(row["question"], _shortened(row))
        if all(len(own) == OF_A_KIND for pair in chosen.values() for own in pair):
            break
    return [(name, *map(lambda own: list(own.values()), pair)) for name, pair in chosen.items() if any(pair)]


def _rows(file: Path) -> list[dict]:
    try:
        return answers.readable(file, _SHOWN)
    except UserError as error:
        _log.warning("passing over %s", error.problem)
        return []


def _shortened(row: dict) -> dict:
    text, left = row["response"], len(row["response"]) - LONGEST_TEXT
    half = LONGEST_TEXT // 2
    return row if left <= 0 else row | {"response": f"{text[:half]}\n[... {left:,} characters ...]\n{text[-half:]}"}

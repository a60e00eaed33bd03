"""The evaluations of a run directory as the report's page shows them."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers, compare, tables

OF_A_KIND = 2  # right answers, and others, shown of a set
LONGEST_TEXT = 4000  # characters shown of an answer
_SHOWN = ["set", "kind", "question", "answer", "response", "verdict", "outcome", "finish_reason", "length"]


@dataclass(frozen=True)
class Shown:
    """One evaluation. The tables' first rows are their headers."""

    name: str
    label: str
    seed: int
    tables: list[tuple[str, list[list[str]]]]  # with their titles
    examples: list[tuple[str, list[dict], list[dict]]]  # set, right answers, others; the columns of the saved answers


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
    parts = [
        ("Accuracy", [tables.header(summary), *tables.rows(summary)]),
        ("pass@j", [tables.pass_header(summary), *tables.pass_rows(summary)]),
        ("Answers", [tables.ANSWERS_HEADER, *tables.answer_rows(summary)]),
    ]
    parts = [(title, table) for title, table in parts if len(table) > 1]
    return Shown(name, summary["label"], summary["seed"], parts, _examples(folder / f"{name}.answers", list(summary["sets"])))


def _examples(directory: Path, sets: list[str]) -> list[tuple[str, list[dict], list[dict]]]:
    """The first right and the first other answers of each set, of different problems, greedy ones before sampled ones."""
    chosen: dict[str, tuple[dict, dict]] = {name: ({}, {}) for name in sets}
    for file in answers.files(directory):
        for row in answers.read(file, _SHOWN):
            if row["set"] in chosen:
                own = chosen[row["set"]][row["outcome"] != "right"]
                if len(own) < OF_A_KIND:
                    own.setdefault(row["question"], _shortened(row))
        if all(len(own) == OF_A_KIND for pair in chosen.values() for own in pair):
            break
    return [(name, *map(lambda own: list(own.values()), pair)) for name, pair in chosen.items() if any(pair)]


def _shortened(row: dict) -> dict:
    text, left = row["response"], len(row["response"]) - LONGEST_TEXT
    half = LONGEST_TEXT // 2
    return row if left <= 0 else row | {"response": f"{text[:half]}\n[... {left:,} characters ...]\n{text[-half:]}"}

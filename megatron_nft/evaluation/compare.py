"""Two evaluations of the same problems, side by side: differences with paired bootstrap, and problem by problem."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from megatron_nft.errors import UserError
from megatron_nft.evaluation import tables
from megatron_nft.evaluation.scores import resampled_means

RESAMPLES = 10_000
SHOWN = 10  # problems of a list in the table
METHOD = (
    f"B - A in points, 95 % interval and p by resampling problems, for both alike ({RESAMPLES:,} times); p: twice the share of resamples "
    "on the other side of 0."
)


@dataclass(frozen=True)
class Difference:
    """Of one kind of accuracy of one set, or of the mean over sets."""

    set: str
    kind: str  # avg@32, or avg@32 | avg@8 where the two have different k; greedy
    problems: int
    a: float
    b: float
    interval: tuple[float, float]  # of b - a
    p: float

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a


@dataclass(frozen=True)
class Change:
    """A problem that the two answer differently."""

    set: str
    id: str
    a: float  # mean verdict
    b: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `changes`: most changed first."""

    a: str
    b: str
    warnings: list[str]
    differences: list[Difference]
    changes: list[Change]

    @property
    def only_a(self) -> list[Change]:
        """Problems that A alone solves, in at least one answer."""
        return [change for change in self.changes if change.b == 0]

    @property
    def only_b(self) -> list[Change]:
        """Problems that B alone solves."""
        return [change for change in self.changes if change.a == 0]

    def as_json(self) -> str:
        """All of it."""
        rows = [{**asdict(one), "difference": one.difference} for one in self.differences]
        lists = {name: list(map(asdict, getattr(self, name))) for name in ("only_a", "only_b", "changes")}
        return json.dumps({"a": self.a, "b": self.b, "warnings": self.warnings, "differences": rows, **lists}, indent=1)

    def plain(self) -> str:
        """As tables for a terminal."""
        parts = [f"A  {self.a}\nB  {self.b}", *self.warnings, tables.aligned([_HEADER, *map(_row, self.differences)]), METHOD]
        return "\n\n".join([*parts, *(f"{title}\n{tables.aligned(table)}" for title, table in self._lists())])

    def markdown(self) -> str:
        """As markdown."""
        parts = [f"A: {self.a}  \nB: {self.b}", *self.warnings, tables.markdown_table([_HEADER, *map(_row, self.differences)]), METHOD]
        return "\n\n".join([*parts, *(f"{title}\n\n{tables.markdown_table(table)}" for title, table in self._lists())])

    def _lists(self) -> list[tuple[str, list[list[str]]]]:
        found = []
        for what, changes in (("only A solves", self.only_a), ("only B solves", self.only_b), ("changed", self.changes)):
            more = f", the first {SHOWN}" if len(changes) > SHOWN else ""
            table = [["set", "problem", "A", "B"], *([c.set, c.id, tables.percent(c.a), tables.percent(c.b)] for c in changes[:SHOWN])]
            found += [(f"problems {what}: {len(changes)}{more}", table)] if changes else []
        return found


_HEADER = ["set", "problems", "accuracy", "A", "B", "B - A", "p"]


def _row(one: Difference) -> list[str]:
    low, high = (f"{100 * end:+.1f}" for end in one.interval)
    return [one.set, str(one.problems), one.kind, tables.percent(one.a), tables.percent(one.b),
            f"{100 * one.difference:+.1f} [{low}, {high}]", f"{one.p:.4f}"]  # fmt: skip


def compare(a: Path, b: Path, name: str | None = None) -> Comparison:
    """Compare two results: JSON files of evaluations/, or run directories with one evaluation, or with one of that name.

    Raises UserError for what is no result, and where the problems of a set are not the same.
    """
    first, second = find(a, name), find(b, name)
    one, other = read(first), read(second)
    common = [name for name in one["sets"] if name in other["sets"]]
    if not common:
        raise UserError(
            f"{first} and {second} have no set in common", f"the sets are {', '.join(one['sets'])} and {', '.join(other['sets'])}"
        )
    for of_set in common:
        _check_same(of_set, one["sets"][of_set], other["sets"][of_set], first, second)
    warnings = _warnings(one, other, common)
    differences, changes = [], []
    for kind in ("avg", "greedy"):
        pairs = {of_set: _paired(kind, one["sets"][of_set], other["sets"][of_set]) for of_set in common}
        pairs = {of_set: pair for of_set, pair in pairs.items() if pair is not None}
        labels = {of_set: _kind(kind, one["sets"][of_set], other["sets"][of_set]) for of_set in pairs}
        differences += [difference(of_set, labels[of_set], [pair]) for of_set, pair in pairs.items()]
        if len(pairs) > 1:
            differences.append(difference(f"mean of {len(pairs)} sets", "greedy" if kind == "greedy" else "avg@k", list(pairs.values())))
    if not differences:
        raise UserError(f"{first} and {second} have no kind of accuracy in common", "evaluate both with greedy, or both with k above 0")
    for of_set in common:
        changes += _changes(of_set, one["sets"][of_set], other["sets"][of_set])
    changes.sort(key=lambda change: -abs(change.a - change.b))
    return Comparison(f"{one['label']} ({first})", f"{other['label']} ({second})", warnings, differences, changes)


def difference(name: str, kind: str, pairs: list[tuple[list[float], list[float]]]) -> Difference:
    """Of the mean over sets, each with the accuracies of its problems by A and by B. The problems of a set are resampled for both alike."""
    both = [numpy.array(pair).T for pair in pairs]  # [problems, 2]
    a, b = (sum(values[:, i].mean() for values in both) / len(both) for i in (0, 1))
    drawn = sum(resampled_means(values[:, 1:] - values[:, :1], seed=i, resamples=RESAMPLES)[:, 0] for i, values in enumerate(both))
    low, high = numpy.quantile(drawn / len(both), (0.025, 0.975))
    p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + RESAMPLES))
    return Difference(name, kind, sum(map(len, both)), float(a), float(b), (float(low), float(high)), float(p))


def find(path: Path, name: str | None = None) -> Path:
    """The file of results: the path itself, or the one in a run directory. Raises UserError where there is none, or more than one."""
    if path.is_file():
        return path
    folder = path / "evaluations" if (path / "evaluations").is_dir() else path
    if name:
        if not (folder / f"{name}.json").is_file():
            raise UserError(f"no evaluation {name} in {path}", f"use one of {', '.join(found_in(folder)) or 'none'}")
        return folder / f"{name}.json"
    names = found_in(folder)
    own = [one for one in names if not re.fullmatch(r"step_\d+", one)] or names
    if len(own) != 1:
        what = f"{len(own)} evaluations in {path}" if own else f"no evaluation at {path}"
        raise UserError(what, f"give --name, one of {', '.join(own)}" if own else "give a file of evaluations/, or a run directory")
    return folder / f"{own[0]}.json"


def found_in(folder: Path) -> list[str]:
    """The names of the evaluations there."""
    return sorted(file.stem for file in folder.glob("*.json"))


def read(file: Path) -> dict:
    """The results in a file. Raises UserError for another kind of file."""
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        if summary["label"] and summary["sets"] and all(map(_is_result, summary["sets"].values())):
            return summary
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{file} holds no results of an evaluation", "give a NAME.json that `megatron-nft evaluate` or a training wrote")


def _is_result(result: dict) -> bool:
    """Whether this is what scores.set_result and evaluate.summarise make of a set."""
    rows = result["by_problem"]
    return "k" in result["settings"] and "fingerprint" in result and bool(rows) and all("id" in row for row in rows)


def _check_same(name: str, one: dict, other: dict, first: Path, second: Path) -> None:
    """Raise UserError where the two are of different problems."""
    mine, theirs = ([row["id"] for row in result["by_problem"]] for result in (one, other))
    if mine == theirs and one["fingerprint"] == other["fingerprint"]:
        return
    differ = sorted({*mine} ^ {*theirs})
    what = f"{len(differ)} are in one only, e.g. {differ[0]}" if differ else "questions, golds or their order differ"
    raise UserError(f"{first} and {second} have different problems in {name} ({what})", "evaluate both on the same data")


def _warnings(one: dict, other: dict, common: list[str]) -> list[str]:
    lonely = [f"{name} is in {which} only" for which, mine, theirs in (("A", one, other), ("B", other, one)) for name in mine["sets"]
              if name not in theirs["sets"]]  # fmt: skip
    found = [f"seeds differ: {one['seed']} and {other['seed']}"] if one.get("seed") != other.get("seed") else []
    for name in common:
        mine, theirs = one["sets"][name]["settings"], other["sets"][name]["settings"]
        found += [f"{key} of {name} differs: {mine[key]} and {theirs.get(key)}" for key in mine if mine[key] != theirs.get(key)]
    return [f"warning: {text}" for text in lonely + found]


def _paired(kind: str, one: dict, other: dict) -> tuple[list[float], list[float]] | None:
    """The accuracies of each problem by both; None where one of them has not that kind."""
    key = "greedy" if kind == "greedy" else "score"
    pair = [[row.get(key) for row in result["by_problem"]] for result in (one, other)]
    return None if None in pair[0] + pair[1] else (pair[0], pair[1])


def _kind(kind: str, one: dict, other: dict) -> str:
    if kind == "greedy":
        return "greedy"
    mine, theirs = (f"avg@{result['settings']['k']}" for result in (one, other))
    return mine if mine == theirs else f"{mine} | {theirs}"


def _changes(name: str, one: dict, other: dict) -> list[Change]:
    pair = _paired("avg", one, other) or _paired("greedy", one, other)
    if pair is None:
        return []
    ids = [row["id"] for row in one["by_problem"]]
    return [Change(name, *row) for row in zip(ids, *pair, strict=True) if row[1] != row[2]]

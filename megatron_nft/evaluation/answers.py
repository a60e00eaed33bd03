"""Answers that are kept while an evaluation goes on: evaluations/NAME.answers, parquet files of whole problems, and settings.json.

An evaluation that was stopped or killed goes on after them, and verdicts can be given anew without a model. Each engine writes files of its
own, complete or not at all. One process alone reads what is there and tells the others, which may see other files, or read them otherwise.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from megatron_nft.errors import UserError, first_line
from megatron_nft.evaluation.files import recover, set_aside
from megatron_nft.evaluation.scores import Answered
from megatron_nft.files import write_parquet, write_whole
from megatron_nft.locks import exclusive
from megatron_nft.trajectories import Prompt, Response

FLUSH_SECONDS = 30.0  # that a problem which is answered waits, at most, while others are answered
MEND = "use the settings it was begun with, another evaluation.name, or resume=false, which begins anew and keeps the old answers beside"
_log = logging.getLogger(__name__)


def directory_of(run_dir: str | Path, name: str) -> Path:
    """Where the answers of an evaluation are."""
    return Path(run_dir) / "evaluations" / f"{name}.answers"


@dataclass(frozen=True)
class Known:
    """What is told of the answers that are there, and the problems, by set and position, that they are all the answers to."""

    told: list[Answered] = field(default_factory=list)
    done: frozenset[tuple[str, int]] = frozenset()


class Answers:
    """Keeps the answers of an engine. `known`: those that were there before; `added`: problems that came since."""

    def __init__(self, directory: Path, known: Known | None = None, engine: int = 0, every: float = FLUSH_SECONDS):
        """engine: which one it is; they are written every so many seconds."""
        self.directory, self.known, self.added = directory, known or Known(), 0
        self._engine, self._every = engine, every
        self._rows: list[dict] = []
        self._last: float | None = None  # when answers were written last; the first problem starts the clock

    def add(self, key: tuple[str, int], prompt: Prompt, kinds: dict[str, list[Response]]) -> None:
        """All answers to a problem; written when it is time."""
        self._rows += [_row(key, prompt, kind, i, one) for kind, responses in kinds.items() for i, one in enumerate(responses)]
        self.added += 1
        self._last = self._last or time.monotonic()
        if time.monotonic() - self._last >= self._every:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._rows:
            number = 1 + max((_number(file) for file in self.directory.glob(f"part-{self._engine}-*")), default=-1)
            write(self.directory / f"part-{self._engine}-{number:05}.parquet", self._rows)
        self._rows, self._last = [], time.monotonic()


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Nobody else evaluates under this name while the block lasts. Raises UserError where another process does."""
    in_use = UserError(f"{directory} is being written by another evaluation", "wait until it has ended, or set evaluation.name")
    with exclusive(directory.with_name(f".{_name(directory)}.lock"), in_use):
        recover(directory)
        yield


def begin(directory: Path, settings: dict, wanted: dict[tuple[str, int], int], resume: bool) -> Known:
    """Make the directory, which is held, ready for an evaluation with these settings; what is known of the answers that are there.

    wanted: how many each problem is to have. A damaged file is renamed: its problems are answered again. Raises UserError where the
    directory was begun with other settings, unless `resume` is false: then all that has this name is moved aside.
    """
    file, before = directory / "settings.json", {}
    if not resume:
        set_aside(directory, *(directory.with_name(f"{_name(directory)}.{kind}") for kind in ("json", "md")))
    elif file.is_file():
        before = read_settings(directory)
        if changed := differences(before, settings):
            raise UserError(f"{directory} was begun with other settings ({'; '.join(changed)})", MEND)
    kept = settings | {"sets": {**before.get("sets", {}), **settings["sets"]}}  # of sets that are left out this time
    write_whole(file, json.dumps(kept, indent=1) + "\n")
    return known(directory, wanted, retire=True)


def known(directory: Path, wanted: dict[tuple[str, int], int], retire: bool = False) -> Known:
    """What is known of the answers that are there. wanted: how many each problem is to have; retire: as of `readable`."""
    rows = [row for file in files(directory) for row in readable(file, _LIGHT, retire)]
    rows.sort(key=_place)
    told = [one for one in _told(rows) if one.key in wanted]
    counts: Counter[tuple[str, int]] = Counter()
    for one in told:
        counts[one.key] += len(one.scores)
    done = frozenset(key for key, number in counts.items() if number == wanted[key])
    return Known([one for one in told if one.key in done], done)


def read_settings(directory: Path) -> dict:
    """What an evaluation was begun with. Raises UserError where there is none, or its file is damaged."""
    file = directory / "settings.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if all(isinstance(one, dict) for one in settings["sets"].values()):
            return settings
        problem = "a set without settings"
    except FileNotFoundError:
        raise nothing_at(directory) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = first_line(error)
    raise UserError(f"{file} is damaged ({problem})", f"remove {directory}, or use resume=false")


def nothing_at(directory: Path) -> UserError:
    """For a name that no evaluation has."""
    return UserError(f"no answers at {directory}", "give the name of an evaluation of this run_dir")


def differences(before: dict, now: dict) -> list[str]:
    """Which settings differ, in words. Sets that one of the two has not are no difference, and neither is where the model lies."""
    keys = now.keys() - {"sets", "model"}
    found = [f"{key} was {before.get(key)}, and is {now[key]}" for key in keys if before.get(key) != now[key]]
    for name in now["sets"].keys() & before.get("sets", {}).keys():
        then, here = before["sets"][name], now["sets"][name]
        found += [f"{key} of {name} was {then.get(key)}, and is {here[key]}" for key in here if then.get(key) != here[key]]
    return sorted(found)


def files(directory: Path) -> list[Path]:
    """The files of answers, in order."""
    return sorted(directory.glob("part-*.parquet"))


def read(file: Path, columns: list[str] | None = None) -> list[dict]:
    """The rows of a file, without those columns that are not asked for."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file, schema=_schema(), columns=columns).to_pylist()


def readable(file: Path, columns: list[str] | None = None, retire: bool = False) -> list[dict]:
    """As `read`; none, with a warning, of a damaged file, which `retire` renames. Raises UserError where the system cannot read it, which
    may pass."""
    import pyarrow

    try:
        return read(file, columns)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's; Arrow's own of a damaged file has none
            mend = "try again, or move it away, and its problems are answered again"
            raise UserError(f"{file} cannot be read ({os.strerror(error.errno)})", mend) from None
        _log.warning("passing over %s, which is damaged (%s)", file, first_line(error))
    if retire:
        file.rename(file.with_name(file.name + ".damaged"))
    return []


def write(file: Path, rows: list[dict]) -> None:
    """Complete or not at all."""
    write_parquet(file, rows, _schema())


def prompt_of(row: dict) -> Prompt:
    """The problem that a row answers, as a judge knows it."""
    return Prompt(row["prompt_id"], row["question"], row["answer"], (), row["set"], tuple(row["alternatives"] or ()), row["reward"])


_LIGHT = ["set", "position", "prompt_id", "kind", "sample", "verdict", "outcome", "found", "length", "finish_reason"]
_place = itemgetter("set", "position", "kind", "sample")


def _told(rows: list[dict]) -> Iterator[Answered]:
    """Of sorted rows; of an answer that is there twice the first counts."""
    for (name, position, kind), own in groupby(rows, key=itemgetter("set", "position", "kind")):
        first = {row["sample"]: row for row in reversed([*own])}
        these = [first[sample] for sample in sorted(first)]
        columns = {key: tuple(row[key] for row in these) for key in _LIGHT}
        cut = tuple(reason == "length" for reason in columns["finish_reason"])
        yield Answered(name, position, these[0]["prompt_id"], kind, columns["verdict"], columns["outcome"], columns["found"],
                       columns["length"], cut)  # fmt: skip


def _row(key: tuple[str, int], prompt: Prompt, kind: str, sample: int, response: Response) -> dict:
    verdict = response.verdict
    return {
        "set": key[0],
        "position": key[1],
        "prompt_id": prompt.id,
        "question": prompt.question,
        "answer": prompt.answer,
        "alternatives": prompt.alternatives,
        "reward": prompt.reward,
        "kind": kind,
        "sample": sample,
        "response": response.text,
        "verdict": verdict.score,
        "outcome": verdict.outcome,
        "found": verdict.found,
        "finish_reason": response.finish_reason,
        "length": len(response.token_ids),
        "tokens": response.token_ids,
    }


def _schema():
    import pyarrow as pa

    text, integer = pa.string(), pa.int64()
    return pa.schema({
        "set": text, "position": integer, "prompt_id": text, "question": text, "answer": text, "alternatives": pa.list_(text),
        "reward": text, "kind": text, "sample": integer, "response": text, "verdict": pa.float64(), "outcome": text, "found": text,
        "finish_reason": text, "length": integer, "tokens": pa.list_(pa.int32()),
    })  # fmt: skip


def _name(directory: Path) -> str:
    return directory.name.removesuffix(".answers")


def _number(file: Path) -> int:
    """N of part-E-N and whatever follows."""
    return int(file.name.split("-")[2].split(".")[0])

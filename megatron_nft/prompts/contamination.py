r"""Which problems of the benchmarks are in the training data: runs of words that a problem has in common with a training question.

As in GPT-3's report (arXiv 2005.14165, appendix C): a problem is touched where any run of 13 words is in a training question, too.
Punctuation, spaces, LaTeX's spacing and fonts, and case do not count. A problem with fewer words has to be there as a whole.
"""

import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_nft.config import BENCHMARKS, Config, DatasetConfig, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.files import write_whole
from megatron_nft.prompts.instructions import strip_instruction
from megatron_nft.prompts.rows import load_rows
from megatron_nft.prompts.sets import distinct_rows

RUN = 13  # words

_COMMANDS = re.compile(r"\\(?:left|right|big+[lr]?|q?quad|displaystyle|text(?:bf|it|rm)?|math(?:rm|bf|it|sf|cal|bb)|operatorname)"
                       r"(?![a-z])|(?<=\\)[dt](?=frac)|(?<=\\[lg]e)q(?![a-z])")  # fmt: skip
_BULLET = re.compile(r"^\s*[-*\u2022\u00b7]\s", re.MULTILINE)
_HYPHEN = re.compile(r"(?<=[^\W_])-(?=[^\W\d_]{2})")
_IDEOGRAPH = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # scripts without spaces between words: each character is one
_WORD = re.compile(rf"{_IDEOGRAPH}|\d+|(?:(?!{_IDEOGRAPH})[^\W\d_])+|[-+*/=<>^|]")
_SIGNS = frozenset("-+*/=<>^|")


@dataclass
class Pair:
    """A problem and a training question that have words in common."""

    problem: str  # set/row id
    training: str  # set/row id
    share: float  # of the problem's runs of words that are in the training question
    exact: bool  # all words and signs are equal


@dataclass
class Touched:
    """What was found for one set."""

    problems: int = 0
    pairs: list[Pair] = field(default_factory=list)

    def count(self, share: float = 0.0, exact: bool = False) -> int:
        """Problems with a pair of at least that share, or an exact one."""
        return len({pair.problem for pair in self.pairs if pair.share >= share and (pair.exact or not exact)})


def words_of(text: str) -> list[str]:
    """The words, numbers and arithmetic signs of a text, in lower case.

    >>> words_of(r"Find $\\dfrac{x+1}{2}$, please.")
    ['find', 'frac', 'x', '+', '1', '2', 'please']
    """
    text = unicodedata.normalize("NFKC", _BULLET.sub(" ", text)).lower().replace("\u2212", "-")
    return _WORD.findall(_HYPHEN.sub(" ", _COMMANDS.sub("", text)))


class Index:
    """The runs of words of all problems, to be looked up in training questions."""

    def __init__(self, problems: dict[str, str], run: int = RUN):
        """problems: text by id."""
        self.run = run
        self._runs: dict[tuple[str, ...], set[str]] = defaultdict(set)  # ids of the problems that have it
        self._numbers: dict[str, int] = {}  # runs of a problem
        self._short: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)  # by the first word: id and words
        self._exact: dict[str, set[str]] = defaultdict(set)  # by all words and signs, however spaced: "A B C" is "ABC"
        for name, text in problems.items():
            self._add(name, words_of(text))

    def _add(self, name: str, words: list[str]) -> None:
        runs = set(self._runs_of(words))
        self._numbers[name] = len(runs)
        for run in runs:
            self._runs[run].add(name)
        if words:
            self._exact["".join(words)].add(name)
        if words and not runs:
            self._short[words[0]].append((name, words))

    def find(self, text: str) -> dict[str, tuple[float, bool]]:
        """The problems that a training question has words in common with: share, and whether it is the same."""
        words = words_of(text)
        exact = self._exact.get("".join(words), ())
        found = Counter(name for run in set(self._runs_of(words)) if run in self._runs for name in self._runs[run])
        shares = {name: number / self._numbers[name] for name, number in found.items()}
        for start, word in enumerate(words):
            if word in self._short:
                shares |= {name: 1.0 for name, short in self._short[word] if words[start : start + len(short)] == short}
        shares |= dict.fromkeys(exact, 1.0)
        return {name: (share, name in exact) for name, share in shares.items()}

    def _runs_of(self, words: list[str]) -> Iterator[tuple[str, ...]]:
        """Runs of words and numbers; signs are passed over, so that formulas do not make up a run by themselves."""
        plain = [word for word in words if word not in _SIGNS]
        return (tuple(plain[start : start + self.run]) for start in range(len(plain) - self.run + 1))


def find_contamination(config: Config, run: int = RUN) -> tuple[dict[str, Touched], int]:
    """Touched problems by set, and the number of training questions. The sets are evaluation.sets, or all benchmarks whose files are in
    evaluation.data_dir. Raises UserError where there are none, and for data that cannot be read."""
    found, problems = {}, {}
    for dataset in _sets(config):
        name = dataset_name(dataset)
        if name in found:
            raise UserError(f"2 data sets have the name {name}", "give each its own `name`")
        rows = [row for row in load_rows(dataset, strip=True) if row["question"]]
        problems |= {f"{name}/{row['id']}": row["question"] for row in rows}
        found[name] = Touched(len(rows))
    index = Index(problems, run)
    training, _ = distinct_rows(config.data.train, config.data)
    for row in training:
        for problem, (share, exact) in index.find(strip_instruction(row["question"])).items():
            found[problem.partition("/")[0]].pairs.append(Pair(problem, f"{row['source']}/{row['id']}", share, exact))
    for touched in found.values():
        touched.pairs.sort(key=lambda pair: (-pair.exact, -pair.share, pair.problem, pair.training))
    return found, len(training)


def _sets(config: Config) -> list[DatasetConfig]:
    evaluation = config.evaluation
    if evaluation.sets:
        return list(evaluation.sets)
    if not evaluation.data_dir:
        raise UserError("there is nothing to compare the training data with", "name evaluation.sets, or the folder evaluation.data_dir")
    there = {name: Path(evaluation.data_dir) / known.file for name, known in BENCHMARKS.items() if not known.training}
    sets = [DatasetConfig(benchmark=name, path=str(path)) for name, path in there.items() if path.is_file()]
    if not sets:
        raise UserError(f"no benchmark is in {evaluation.data_dir}", f"it should hold one of {', '.join(p.name for p in there.values())}")
    return sets


def table(found: dict[str, Touched], run: int = RUN) -> str:
    """By set: problems, exact duplicates, those with half of their runs in one training question, all that are touched, and the
    training questions that these are in."""
    rows = [["set", "problems", "exact", "half", f"{run} words", "training questions"]]
    for name, touched in found.items():
        questions = len({pair.training for pair in touched.pairs})
        counts = (touched.problems, touched.count(exact=True), touched.count(0.5), touched.count(), questions)
        rows.append([name, *map(str, counts)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(f"{row[0]:<{widths[0]}}  " + "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])) for row in rows)


def report(config: Config, run: int, share: float, output: Path | None, ids: Path | None) -> None:
    """`megatron-nft contamination`: print the table, write all pairs as JSON to `output` (default: run_dir/contamination.json) and, where
    `ids` is given, the ids of the training questions with a share of at least `share` of a problem's runs, for data.exclude."""
    if run < 1 or not 0 <= share <= 1:
        raise UserError(f"--words is {run} and --share {share}", "use 1 or more words, and a share from 0 to 1")
    output = output or Path(config.run_dir) / "contamination.json"
    for path in filter(None, (output, ids)):
        _check_place(path)
    found, count = find_contamination(config, run)
    _write(output, json.dumps(_as_json(found, count, run), indent=1, ensure_ascii=False) + "\n")
    print(f"{table(found, run)}\n{count} training questions; all pairs: {output}")
    if ids is not None:
        chosen = sorted({pair.training for touched in found.values() for pair in touched.pairs if pair.share >= share})
        _write(ids, "".join(f"{name}\n" for name in chosen))
        print(f"{len(chosen)} ids with a share of {share:g} or more: {ids}; leave them out with data.exclude={ids}")


def _as_json(found: dict[str, Touched], count: int, run: int) -> dict[str, Any]:
    sets = {
        name: {
            "problems": touched.problems,
            "exact": touched.count(exact=True),
            "half": touched.count(0.5),
            "touched": touched.count(),
            "pairs": [asdict(pair) for pair in touched.pairs],
        }
        for name, touched in found.items()
    }
    return {"words": run, "training_questions": count, "sets": sets}


def _write(path: Path, text: str) -> None:
    """Complete or not at all."""
    try:
        _check_place(path)
        write_whole(path, text)
    except OSError as error:
        with suppress(OSError):
            path.with_name(path.name + ".part").unlink()
        raise UserError(f"cannot write {path} ({error.strerror})", "name another file") from None


def _check_place(path: Path) -> None:
    """Raise UserError where something else than a file is there: a device would be replaced."""
    if os.path.exists(path) and not os.path.isfile(path):  # pathlib's own raise for a name that is too long
        raise UserError(f"cannot write {path}: it is no file", "name a file")

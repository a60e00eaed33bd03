"""The rows of a data set, with its columns under one name each."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_nft.config import BENCHMARKS, DatasetConfig
from megatron_nft.errors import UserError
from megatron_nft.prompts.instructions import strip_instruction
from megatron_nft.prompts.tables import Wanted, read_table
from megatron_nft.rewards.boxed import last_boxed

_ABSENT = object()
_ID_COLUMNS = ("id", "extra_info.index")
# what published sets call them, for the mend of a column that is missing
_USUAL = {
    "question": ("problem", "question", "prompt", "query", "input", "instruction", "messages"),
    "answer": ("answer", "final_answer", "reward_model.ground_truth", "ground_truth", "expected_answer", "gold", "target", "solution"),
}
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)(\.0*)?")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def load_rows(dataset: DatasetConfig, strip: bool = False) -> list[dict[str, Any]]:
    """The rows that read_rows gives, as a list."""
    return list(read_rows(dataset, strip))


def read_rows(dataset: DatasetConfig, strip: bool = False) -> Iterator[dict[str, Any]]:
    """The rows as {id, question, answer} (strings without the spaces around them; "" where the data has null or no gold), where the data
    has them also `solution`, `alternatives`, a tuple of further golds, `turns`, the chat before the question, as a list of
    {role, content}, and `reward`, the verdict function.

    The id is the column of that name or dataset.id, else extra_info.index, else the row's number from 0. strip: published instructions
    around questions come off, unless dataset.strip_instruction says otherwise. One row is in memory at a time, where the file
    allows it. Raises UserError for a file that cannot be read, a missing column, a column that holds something else than text or a
    number, and two questions with one id.
    """
    columns = _Columns(dataset, strip if dataset.strip_instruction is None else dataset.strip_instruction)
    questions: dict[str, int] = {}  # a hash of each id's question
    for number, raw in enumerate(read_table(dataset, columns.wanted)):
        row = columns.row(raw, number)
        key = hash(" ".join(row["question"].split()))
        if questions.setdefault(row["id"], key) != key:
            raise UserError(f"two questions of {dataset.path} have the id {row['id']!r}", "make the ids unique, or remove the column")
        yield row


class _Columns:
    """From the columns of one data set to the common names."""

    def __init__(self, dataset: DatasetConfig, strip: bool):
        self.dataset, self.strip = dataset, strip
        self.ids = (dataset.id,) if dataset.id else _ID_COLUMNS
        self.integers = dataset.benchmark is not None and BENCHMARKS[dataset.benchmark].integers
        needed = [dataset.question, dataset.answer, *filter(None, (dataset.id, dataset.source))]
        self.wanted = Wanted(list(dict.fromkeys(needed)), [name for name in (*self.ids, dataset.solution) if name not in needed])

    def row(self, raw: dict[str, Any], number: int) -> dict[str, Any]:
        """One raw row."""
        dataset, where = self.dataset, f"row {number} of {self.dataset.path}"
        value = _column(raw, dataset.question, where, "question")
        question, turns = _question(value, f"column {dataset.question} in {where}")
        golds = self._golds(_column(raw, dataset.answer, where, "answer"), f"column {dataset.answer} in {where}")
        row = {"id": self._id(raw, number, where), "question": strip_instruction(question) if self.strip else question, "answer": golds[0]}
        solution = _reach(raw, dataset.solution)
        if solution is not _ABSENT and solution is not None:
            row["solution"] = _text(_only(solution), f"column {dataset.solution} in {where}")
        more = {"turns": turns, "alternatives": tuple(golds[1:]), "reward": self._reward(raw, where)}
        return row | {key: value for key, value in more.items() if value}

    def _id(self, raw: dict[str, Any], number: int, where: str) -> str:
        if self.dataset.id:
            _column(raw, self.dataset.id, where, "id")
        found = [value for name in self.ids if (value := _reach(raw, name)) is not _ABSENT and value is not None]
        name = _text(found[0], f"the id in {where}") if found else str(number)
        if not name.isprintable():
            raise UserError(f"the id in {where} is {name!r}", "leave out line breaks and other signs that cannot be printed")
        return name

    def _reward(self, raw: dict[str, Any], where: str) -> str | None:
        if not self.dataset.source:
            return self.dataset.reward
        source = _text(_column(raw, self.dataset.source, where, "source"), f"column {self.dataset.source} in {where}")
        return self.dataset.rewards.get(source, self.dataset.reward)

    def _golds(self, value: Any, where: str) -> list[str]:
        """The golds of a column, each once; [""] where it has none."""
        texts = [self._gold(_text(one, where)) for one in (value if isinstance(value, list) else [value])]
        return list(dict.fromkeys(filter(None, texts))) or [""]

    def _gold(self, text: str) -> str:
        if self.dataset.answer_from == "hash":
            text = _THOUSANDS.sub("", text.rpartition("####")[2].strip()) if "####" in text else ""
        elif self.dataset.answer_from == "box":
            text = last_boxed(text) or ""
        if self.integers and text:
            return self._integer(text)
        return text

    def _integer(self, text: str) -> str:
        found = _INTEGER.fullmatch(_THOUSANDS.sub("", text))
        if not found:
            name = self.dataset.benchmark
            short = text if len(text) <= 40 else f"... {text[-40:]}"
            raise UserError(f"{self.dataset.path} has the gold {short!r}, but those of {name} are integers",
                            "set answer to the column of the bare gold, or answer_from to hash or box")  # fmt: skip
        return found[1].strip("+") + found[2]


def _question(value: Any, where: str) -> tuple[str, list[dict[str, str]]]:
    """The question, and the turns before it where the column holds a chat."""
    if not isinstance(value, list):
        return _text(value, where), []
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() and isinstance(turn["role"], str) for turn in value):
        raise UserError(f"{where} is a list, but not of {{role, content}}", "let it hold a text, or a chat")
    if not value or value[-1]["role"] != "user":
        raise UserError(f"{where} holds a chat that does not end in a turn of the user", "cut what comes after the question")
    turns = [{"role": turn["role"], "content": _text(turn["content"], where)} for turn in value[:-1]]
    return _text(value[-1]["content"], where), turns


def _only(value: Any) -> Any:
    """A list of one counts as that one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _text(value: Any, where: str) -> str:
    """A text or a number as text."""
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} holds a {type(value).__name__}", "name a column that holds a text or a number")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half of a surrogate pair", "mend the text: no tokenizer can read it") from None
    if "\0" in text:
        raise UserError(f"{where} holds a NUL character", "remove it from the text")
    return text


def _column(raw: dict[str, Any], name: str, where: str, setting: str) -> Any:
    """The value of a column that must be there."""
    value = _reach(raw, name)
    if value is _ABSENT:
        names = list(_names(raw))
        usual = [other for other in _USUAL.get(setting, ()) if _reach(raw, other) is not _ABSENT]
        near = difflib.get_close_matches(name, names, 1) or usual
        mend = f"set {setting} of the data set to {near[0]}?" if near else f"set {setting} of the data set to its column"
        raise UserError(f"{where} has no column {name}; it has {', '.join(names)}", mend)
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

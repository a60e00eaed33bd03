"""Answers of a run to look at: right and wrong ones of its first and last step, token by token in the colours of what the updates did."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.logbook import step_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_A_KIND = 3  # right answers, and wrong ones, shown of a step
LONGEST_TEXT = 6000  # characters shown of an answer
LONGEST_ROW = 1200  # tokens shown of one whose tokens are
UP, DOWN = "44, 125, 73", "178, 58, 50"  # red, green, blue: pushed up, pushed down
STRONGEST = 0.65  # opacity of the largest |c| of a step
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


@dataclass(frozen=True)
class Token:
    """A token as the page shows it, or the few that make up one character."""

    text: str
    title: str  # R and c
    colour: str  # CSS; empty where nothing pushes
    masked: bool  # not trained on


def sample_answers(run_dir: Path, model_path: str = "") -> list[tuple[int, list[dict], list[dict]]]:
    """(step, right answers, wrong answers) of the first and the last saved rollout step.

    Each answer is a dict of the columns question, answer, response, outcome, finish_reason, plus `length` in tokens and, where the run
    wrote down R and c of its tokens and their tokenizer is there (with the model, or in the run's export), `tokens` (Tokens) and `largest`,
    the |c| of the strongest colour. Answers that have them are shown before others.
    """
    files, models = step_files(run_dir), (model_path, str(run_dir / "huggingface"))
    return [(step, *_of_step(run_dir, step, files[step], models)) for step in sorted({min(files), max(files)} if files else ())]


def _of_step(run_dir: Path, step: int, files: list[Path], models: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    pushes = _pushes(run_dir / "rollouts" / f"coefficients_{step}.parquet")
    light = [{**row, "file": file, "row": i} for file in files for i, row in enumerate(_rows(file, ["prompt_id", *_KEY, "verdict"]))]
    light.sort(key=lambda one: _key(one) not in pushes)
    kinds = [_of_different_prompts([one for one in light if (one["verdict"] >= 0.5) is right]) for right in (True, False)]
    watched = [pushes[_key(one)] for kind in kinds for one in kind if _key(one) in pushes]
    largest = max((abs(c) for one in watched for c in one["c"] if c is not None), default=0.0)
    tokenizer, full = _tokenizer(models) if watched else None, _in_full([one for kind in kinds for one in kind])
    right, wrong = ([_shown(full[one["file"], one["row"]], pushes.get(_key(one)), largest, tokenizer) for one in kind] for kind in kinds)
    return right, wrong


_KEY = ("position", "sample")
_COLUMNS = ["prompt_id", "question", "answer", "response", "verdict", "outcome", "finish_reason", "tokens"]


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in _KEY)


def _rows(path: Path, columns: list[str]) -> list[dict]:
    """The rows of a file, of those columns that it has."""
    import pyarrow.parquet  # only here: a page without samples needs no arrow

    file = pyarrow.parquet.ParquetFile(path)
    return file.read(columns=[name for name in columns if name in file.schema_arrow.names]).to_pylist()


def _in_full(chosen: list[dict]) -> dict[tuple[Path, int], dict]:
    """All that is shown of the chosen answers, by file and row."""
    import pyarrow.parquet

    tables = {file: pyarrow.parquet.read_table(file, columns=_COLUMNS) for file in {one["file"] for one in chosen}}
    return {(one["file"], one["row"]): tables[one["file"]].slice(one["row"], 1).to_pylist()[0] for one in chosen}


def _pushes(path: Path) -> dict[tuple, dict]:
    """R and c of the answers that the run watched, by position and sample."""
    return {_key(row): row for row in _rows(path, [*_KEY, "R", "c"]) if row.keys() >= {*_KEY, "R", "c"}} if path.is_file() else {}


@cache
def _tokenizer(models: tuple[str, ...]) -> "PreTrainedTokenizerBase | None":
    """Of the first of these directories that has one; None where none has (any more): the page does without colours then."""
    for model in models:
        if any((Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(model, local_files_only=True)
    return None


def _of_different_prompts(answers: list[dict]) -> list[dict]:
    """The first few answers, each to another prompt."""
    first = {}
    for one in answers:
        first.setdefault(one["prompt_id"], one)
    return list(first.values())[:OF_A_KIND]


def _shown(answer: dict, pushes: dict | None = None, largest: float = 0.0, tokenizer: Any = None) -> dict:
    """An answer as the page shows it."""
    text, ids = answer["response"], answer["tokens"]
    if len(text) > LONGEST_TEXT:
        text = f"{text[: LONGEST_TEXT // 2]}\n[... {len(text) - LONGEST_TEXT:,} characters ...]\n{text[-LONGEST_TEXT // 2 :]}"
    shown = {**answer, "response": text, "length": len(ids), "tokens": None, "largest": largest}
    if pushes is not None and tokenizer is not None and len(pushes["c"]) == len(ids):
        shown["tokens"] = _shortened([*_tokens(ids, pushes["R"], pushes["c"], largest, tokenizer)])
    return shown


def _shortened(tokens: list[Token]) -> list[Token]:
    left = len(tokens) - LONGEST_ROW
    if left <= 0:
        return tokens
    half = LONGEST_ROW // 2
    return [*tokens[:half], Token(f"\n[... {left:,} tokens ...]\n", "", "", True), *tokens[-half:]]


def _tokens(ids: list[int], ratios: list, coefficients: list, largest: float, tokenizer: Any) -> Iterator[Token]:
    """Each token's text as it stands in the answer. Tokens that hold parts of a character are taken together."""
    first = 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[max(first - 1, 0) : first])  # some tokenizers take the space off the beginning of a text
        text = tokenizer.decode(ids[max(first - 1, 0) : end]).removeprefix(before)
        if _BROKEN in text and end < len(ids) and end - first < 8:
            continue
        numbers = [pair for pair in zip(ratios[first:end], coefficients[first:end], strict=True) if pair[1] is not None]
        title = "; ".join(f"R {ratio:.4g}, c {c:+.3g}" for ratio, c in numbers) or "not trained on"
        yield Token(text, title, _colour(max((c for _, c in numbers), key=abs, default=0.0), largest), not numbers)
        first = end


def _colour(c: float, largest: float) -> str:
    return f"rgba({UP if c > 0 else DOWN}, {STRONGEST * abs(c) / largest:.2f})" if c and largest else ""

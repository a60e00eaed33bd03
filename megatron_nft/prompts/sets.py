"""From data sets to Prompts: rows, filters, template."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.config import DataConfig, DatasetConfig, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.prompts.filters import filter_rows, read_excluded
from megatron_nft.prompts.rows import read_rows
from megatron_nft.prompts.templates import Template
from megatron_nft.trajectories import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class PromptSet:
    """Prompts in the order of the data, and how many rows were dropped for what reason."""

    prompts: list[Prompt]
    dropped: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # tokens of each that was neither empty, conflicting nor a duplicate, in order

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @property
    def told(self) -> str:
        """What was dropped, to be put behind a number: " (dropped: too_long 3)"; nothing where nothing was."""
        dropped = ", ".join(f"{reason} {number}" for reason, number in self.dropped.items() if number)
        longest = f", the longest has {max(self.lengths)} tokens" if self.dropped.get("too_long") and self.lengths else ""
        return f" (dropped: {dropped}{longest})" if dropped else ""

    @property
    def length_table(self) -> str:
        """Quantiles of the lengths before the length filter: "tokens: median 93, 90 % 180, 99 % 310, longest 1204"."""
        ordered = sorted(self.lengths)
        if not ordered:
            return "tokens: none"
        at = [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.9, 0.99)]
        return f"tokens: median {at[0]}, 90 % {at[1]}, 99 % {at[2]}, longest {ordered[-1]}"

    @property
    def fingerprint(self) -> str:
        """A hash of all questions and golds in their order. Chat template and instruction are not part of it."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.id, prompt.source, prompt.question, *prompt.golds]).encode())
        return digest.hexdigest()[:16]


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UserError(f"no model directory at {path}", "set model.path to a Hugging Face directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} has no tokenizer that can be loaded ({_first_line(error)})",
                        "copy tokenizer.json and tokenizer_config.json of the model into it") from None  # fmt: skip
    return tokenizer


def load_prompts(datasets: list[DatasetConfig], tokenizer: "PreTrainedTokenizerBase", data: DataConfig) -> PromptSet:
    """All data sets as one PromptSet. Prompt ids are `set/row id`.

    Dropped and counted: `empty` (no question or no gold), `conflicting` (equal questions, spaces apart, whose golds differ),
    `duplicate` (all but the first of equal questions), with data.exclude `excluded` (questions of the ids that it lists), `too_long`
    (over data.max_prompt_length tokens). Raises UserError when nothing is left.
    """
    template = Template.load(tokenizer, data)
    kept, dropped = distinct_rows(datasets, data)
    texts = [template.text(row["question"], row.get("turns", ())) for row in kept]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    lengths = [len(ids) for ids in token_ids]
    prompts = [_prompt(row, ids) for row, ids in zip(kept, token_ids, strict=True) if len(ids) <= data.max_prompt_length]
    count = len(kept) + sum(dropped.values())
    dropped["too_long"] = len(kept) - len(prompts)
    if not prompts:
        counts = ", ".join(f"{reason} {number}" for reason, number in dropped.items())
        longest = f"; the shortest prompt has {min(lengths)} tokens" if lengths else ""
        raise UserError(f"no usable prompts among the {count} rows of {', '.join(d.path for d in datasets)} ({counts}{longest})",
                        "check the columns, or raise data.max_prompt_length")  # fmt: skip
    return PromptSet(prompts, dropped, lengths)


def distinct_rows(datasets: list[DatasetConfig], data: DataConfig) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of all data sets with `source`, the set's name, each question once, and how many others there were for what reason; as
    load_prompts has them, before the length filter."""
    _check_names(datasets)
    strip = bool(data.instruction)
    named = [(dataset_name(dataset), dataset) for dataset in datasets]
    rows = (row | {"source": name} for name, dataset in named for row in read_rows(dataset, strip))
    return filter_rows(rows, read_excluded(data.exclude))


def load_sets(datasets: list[DatasetConfig], tokenizer: "PreTrainedTokenizerBase", data: DataConfig) -> dict[str, PromptSet]:
    """Each data set as a PromptSet of its own, by name; data.exclude is for training alone. Raises UserError as load_prompts does."""
    if datasets:
        _check_names(datasets)
    return {dataset_name(dataset): load_prompts([dataset], tokenizer, replace(data, exclude=None)) for dataset in datasets}


def _prompt(row: dict[str, Any], token_ids: list[int]) -> Prompt:
    return Prompt(f"{row['source']}/{row['id']}", row["question"], row["answer"], tuple(token_ids), row["source"],
                  row.get("alternatives", ()), row.get("reward"))  # fmt: skip


def _check_names(datasets: list[DatasetConfig]) -> None:
    """Names are the sources of prompts and choose their verdict functions, so each may stand once."""
    if not datasets:
        raise UserError("no data set is given", "list one or more, e.g. under data.train: path, question, answer")
    name, number = Counter(map(dataset_name, datasets)).most_common(1)[0]
    if number > 1:
        raise UserError(f"{number} data sets have the name {name}", "give each its own `name`")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""From data sets to Prompts: rows of a file or of the hub, the template, the filters, and the cursor that training reads from."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.config import DataConfig, DatasetConfig, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.filters import filter_rows, read_excluded
from megatron_nft.rows import load_rows, read_rows
from megatron_nft.templates import Template
from megatron_nft.trajectories import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Cursor",
    "PromptSet",
    "Template",
    "chat_text",
    "dataset_name",
    "distinct_rows",
    "load_prompts",
    "load_rows",
    "load_sets",
    "load_tokenizer",
]


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


def chat_text(question: str, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, turns: Sequence[dict] = ()) -> str:
    """The text that the model continues, as Template.text says; for more than one question load the Template once."""
    return Template.load(tokenizer, data).text(question, turns)


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


class Cursor:
    """Hands out prompts without end, epoch after epoch; with `shuffle` each epoch has an order of its own, given by (seed, epoch).

    It remembers the last correct rates of each prompt, and passes a prompt over whose groups were uniform (nothing to learn from): with
    probability most_skipped x (1 - 2^-u) after u uniform groups in a row, drawn from (seed, epoch, prompt), so that every prompt comes
    again sooner or later. Its state is small, and a cursor restored from it goes on exactly where the saved one stood.
    """

    RATES = 4  # remembered of a prompt

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool = True, most_skipped: float = 0.0):
        self.prompts, self.seed, self.shuffle, self.most_skipped = prompts, seed, shuffle, most_skipped
        self.epoch, self.position = 0, 0
        self.skipped = 0  # prompts passed over so far
        self._memory: dict[str, tuple[list[float], int]] = {}  # by id: last correct rates, and how many uniform groups in a row
        self._by_id = {prompt.id: prompt for prompt in prompts}
        self._order = self._make_order()

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; at the end of an epoch the next one begins, so n may exceed what is left of it."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self._order):
                self._go_to(self.epoch + 1, 0)
            prompt = self.prompts[self._order[self.position]]
            self.position += 1
            if self._passes_over(prompt):
                self.skipped += 1
            else:
                taken.append(prompt)
        return taken

    def mark(self) -> tuple[int, int, int]:
        """Where the cursor stands, for `rewind`."""
        return self.epoch, self.position, self.skipped

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Stand where `mark` was called; what is remembered of prompts stays."""
        epoch, position, self.skipped = mark
        self._go_to(epoch, position)

    def prompt(self, name: str) -> Prompt:
        """By its id."""
        return self._by_id[name]

    def remember(self, prompt: Prompt, correct_rate: float, is_mixed: bool) -> None:
        """A group of the prompt is complete. With most_skipped 0 nothing is kept."""
        if self.most_skipped:
            rates, uniform = self._memory.get(prompt.id, ([], 0))
            self._memory[prompt.id] = [*rates, correct_rate][-self.RATES :], 0 if is_mixed else uniform + 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, fit for JSON."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "shuffle": self.shuffle,
                "prompts": len(self.prompts), "fingerprint": self.prompts.fingerprint, "skipped": self.skipped,
                "memory": {name: [list(rates), uniform] for name, (rates, uniform) in self._memory.items()}}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the saved cursor stood, with its seed and its order. Raises UserError when the prompts are not the same."""
        if state["fingerprint"] != self.prompts.fingerprint:
            raise UserError(f"the training prompts changed since the checkpoint ({state['prompts']} then, {len(self.prompts)} now; "
                            f"fingerprint {state['fingerprint']} then, {self.prompts.fingerprint} now)",
                            "restore the data and data.* settings, or start a new run_dir")  # fmt: skip
        self.epoch, self.position, self.seed, self.shuffle = (state[key] for key in ("epoch", "position", "seed", "shuffle"))
        self.skipped = state["skipped"]
        self._memory = {name: (list(rates), uniform) for name, (rates, uniform) in state["memory"].items()}
        self._order = self._make_order()

    def _passes_over(self, prompt: Prompt) -> bool:
        _, uniform = self._memory.get(prompt.id, ([], 0))
        probability = self.most_skipped * (1 - 0.5**uniform)
        return probability > 0 and random.Random(f"{self.seed}/{self.epoch}/{prompt.id}").random() < probability

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self._order = self._make_order()
        self.position = position

    def _make_order(self) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order

"""Published sets of problems that a data set can name as `benchmark`: where they are on the hub, and what their columns hold.

A set is either as published on the hub, or a file of the same problems (evaluation.data_dir, or a `path` of the data set), whose rows
have problem and answer with the bare gold. What a data set sets itself goes over what stands here.
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_nft.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Columns:
    """What the columns hold; the names of the settings of a data set, with the defaults that these have."""

    question: str = "problem"
    answer: str = "answer"
    answer_from: str = "plain"
    id: str | None = None
    solution: str = "solution"


@dataclass(frozen=True)
class Benchmark:
    """One published set."""

    path: str  # on the hub
    split: str
    file: str  # in evaluation.data_dir
    columns: Columns = Columns()  # on the hub
    file_columns: Columns = Columns()
    subset: str | None = None
    integers: bool = False  # all golds are integers, and are read as such: "025" is 25, "1,000" 1000, 27.0 27
    reward: str | None = None  # verdict function; None: reward.function
    training: bool = False  # a set to train on


_VERL = Columns("prompt", "reward_model.ground_truth", id="extra_info.index")
_GSM8K = {"path": "openai/gsm8k", "subset": "main", "columns": Columns("question", answer_from="hash", solution="answer"), "integers": True}

BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "aime24.jsonl", integers=True),
    "aime25": Benchmark("math-ai/aime25", "test", "aime25.jsonl", integers=True),
    "amc23": Benchmark("math-ai/amc23", "test", "amc23.jsonl", Columns("question"), integers=True),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "math500.jsonl", Columns(id="unique_id"), reward="math_verify"),
    "olympiadbench": Benchmark("Hothan/OlympiadBench", "train", "olympiadbench.jsonl", Columns("question", "final_answer"),
                               subset="OE_TO_maths_en_COMP", reward="math_verify"),
    "minerva": Benchmark("math-ai/minervamath", "test", "minerva_math.jsonl", Columns("question"), reward="math_verify"),
    "gsm8k": Benchmark(split="test", file="gsm8k_test.jsonl", **_GSM8K),
    # for training
    "gsm8k_train": Benchmark(split="train", file="gsm8k_train.jsonl", training=True, **_GSM8K),
    "math_train": Benchmark("DigitalLearningGmbH/MATH-lighteval", "train", "math_train.jsonl",
                            Columns(answer="solution", answer_from="box"), reward="math_verify", training=True),
    "dapo_math_17k": Benchmark("BytedTsinghua-SIA/DAPO-Math-17k", "train", "dapo_math_17k.parquet", _VERL, _VERL, training=True),
}  # fmt: skip


def find(name: str) -> Benchmark:
    """The benchmark of that name. Raises UserError with the nearest name where there is none."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(str(name).lower(), BENCHMARKS, 1, cutoff=0.5)
        raise UserError(f"there is no benchmark {name!r}", f"did you mean {near[0]}?" if near else f"use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def complete(dataset, data_dir: str | None = None) -> None:
    """Fill what a DatasetConfig leaves out (None): from its benchmark, where it names one, then with the defaults of Columns.

    data_dir: the folder that the benchmark's file is taken from where the data set has no path. Raises UserError for an unknown name.
    """
    columns = Columns()
    if dataset.benchmark is not None:
        known = find(dataset.benchmark)
        path = dataset.path or (str(Path(data_dir) / known.file) if data_dir else known.path)
        columns = known.file_columns if path.endswith(DATA_SUFFIXES) else known.columns
        _fill(dataset, path=path, name=dataset.benchmark, split=known.split, reward=known.reward)
        if path == known.path:
            _fill(dataset, subset=known.subset)
    _fill(dataset, split="train", **{field.name: getattr(columns, field.name) for field in fields(Columns)})


def _fill(dataset, **values: str | None) -> None:
    for key, value in values.items():
        if getattr(dataset, key) is None:
            setattr(dataset, key, value)

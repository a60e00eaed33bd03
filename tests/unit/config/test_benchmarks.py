"""Benchmarks by name: what is published, a folder of files, and what the data set itself sets."""

import pytest

from megatron_nft.config import (
    BENCHMARKS,
    DatasetConfig,
    EvaluationConfig,
    EvaluationSetConfig,
    dataset_name,
    describe,
    load,
    load_with_sources,
    save,
)
from megatron_nft.errors import UserError

LEAST = "run_dir: runs/a\nmodel: {path: m}\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_text(LEAST + text)
        return tmp_path / "a.yaml"

    return write


def test_a_benchmark_is_taken_from_the_hub_as_it_is_published(write):
    gsm8k, minerva = load(write("evaluation: {sets: [{benchmark: gsm8k, k: 4}, {benchmark: minerva}]}")).evaluation.sets
    assert (gsm8k.path, gsm8k.subset, gsm8k.split) == ("openai/gsm8k", "main", "test")
    assert (gsm8k.question, gsm8k.answer, gsm8k.answer_from, gsm8k.reward, gsm8k.k) == ("question", "answer", "hash", None, 4)
    assert (dataset_name(minerva), minerva.path, minerva.reward) == ("minerva", "math-ai/minervamath", "math_verify")


def test_with_data_dir_it_is_a_file_of_plain_golds_whichever_layer_names_what(write):
    path = write("evaluation: {sets: [{benchmark: gsm8k}, {path: own.jsonl, question: q}]}")
    for config in (load(path, ["evaluation.data_dir=/d"]), load(path, ["evaluation={data_dir: /d}"])):
        gsm8k, own = config.evaluation.sets
        assert (gsm8k.path, gsm8k.question, gsm8k.answer_from, gsm8k.subset) == ("/d/gsm8k_test.jsonl", "problem", "plain", None)
        assert (own.path, own.question) == ("own.jsonl", "q")


def test_what_the_set_says_goes_over_the_benchmark(write):
    text = "{benchmark: math500, path: mine.parquet, question: problem, answer: gold, reward: strict_box, name: m}"
    found = load(write(f"evaluation: {{data_dir: /d, sets: [{text}]}}")).evaluation.sets[0]
    assert (found.path, found.question, found.answer, found.reward, found.name) == ("mine.parquet", "problem", "gold", "strict_box", "m")
    assert load(write("data: {train: [{benchmark: gsm8k_train, question: problem}]}")).data.train[0].question == "problem"
    changed = load(write("evaluation: {sets: [{benchmark: gsm8k}]}"), ["evaluation.sets.0.benchmark=math500"])
    assert changed.evaluation.sets == [EvaluationSetConfig(benchmark="math500")]


def test_the_saved_config_names_the_same_rows(write, tmp_path):
    config = load(write("evaluation: {data_dir: /d, sets: [{benchmark: aime24}]}\ndata: {train: [{benchmark: dapo_math_17k}]}"))
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config
    assert config.data.train[0].answer == "reward_model.ground_truth"


def test_the_settings_that_are_told_leave_out_the_defaults(write):
    told = describe(*load_with_sources(write("data: {train: [{path: a.jsonl, answer: gold}]}")))
    assert "[{answer: gold, path: a.jsonl}]" in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("evaluation: {sets: [{benchmark: mat500}]}", "there is no benchmark 'mat500': did you mean math500?"),
        ("evaluation: {sets: [{benchmark: AIME-24}]}", "did you mean aime24?"),
        ("evaluation: {sets: [{benchmark: zzz}]}", "use one of aime24, aime25"),
        ("data: {train: [{name: a}]}", "data.train[0].path has no value"),
        ("data: {train: [{path: a, answer_from: hsh}]}", "data.train[0].answer_from is 'hsh': use one of plain, hash, box"),
        ("sft: {data: [{path: a, rewards: {x: dapo}}]}", "sft.data[0].rewards is set, but sft.data[0].source is not"),
        ("evaluation: {sets: [{path: a, temprature: 1}]}", "did you mean temperature?"),
        ("evaluation: {sets: [{path: a, limit: 0}]}", "limit of a is 0"),
        ("evaluation: {sets: [{path: a, name: own/a}]}", "evaluation.sets[0].name is 'own/a': leave out the slash"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(write, text, said):
    with pytest.raises(UserError) as caught:
        load(write(text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_benchmark_has_a_place_a_file_and_columns():
    assert {"aime24", "aime25", "amc23", "math500", "olympiadbench", "minerva", "gsm8k"} <= BENCHMARKS.keys()
    assert len({known.file for known in BENCHMARKS.values()}) == len(BENCHMARKS)
    for name in BENCHMARKS:
        sets = EvaluationConfig(sets=[EvaluationSetConfig(benchmark=name)], data_dir="/d").sets
        assert sets[0].path == f"/d/{BENCHMARKS[name].file}" and DatasetConfig(benchmark=name).path.count("/") == 1

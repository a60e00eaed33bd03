"""Settings: what is read and written, and the one line that a mistake in them gets."""

import copy

import pytest

from megatron_nft.config import (
    Config,
    DatasetConfig,
    EvaluationSetConfig,
    dataset_name,
    known_keys,
    load,
    max_answer_length,
    max_model_len,
    save,
)
from megatron_nft.errors import UserError
from tests.support import ROOT

LEAST = "run_dir: runs/a\nmodel: {path: models/m}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def wrong(path, *overrides: str) -> UserError:
    """The error that loading this gives; it has to be one line."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_is_not_given_has_its_default(write):
    expected = Config(run_dir="runs/a")
    expected.model.path = "models/m"
    assert load(write(LEAST)) == expected


def test_overrides_win_over_the_file_and_the_last_over_the_first(write):
    config = load(
        write(LEAST + "rollout: {n: 4, temperature: 0.7}\n"), ["rollout.n=16", "optimizer.lr=5e-6", "seed=1", "seed=2", "run_dir=a=b"]
    )
    assert (config.rollout.n, config.rollout.temperature, config.optimizer.lr, config.seed) == (16, 0.7, 5e-6, 2)
    assert config.run_dir == "a=b"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seed=7", 7), ("resume=false", False), ("optimizer.lr=1", 1.0), ("optimizer.lr=1e-6", 1e-6), ("model.path=12", "12"),
        ("data.system=null", None), ("data.system=be brief", "be brief"), ("rollout.max_prompts_per_step=null", None),
        ("rollout.max_prompts_per_step=99", 99), ("run_dir=${model.path}", "models/m"),
    ],
)  # fmt: skip
def test_overrides_are_read_by_the_type_of_their_setting(write, override, expected):
    value = load(write(LEAST), [override])
    for part in override.split("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_data_sets_by_file_and_by_override(write):
    path = write(LEAST + "data: {train: [{path: a.jsonl, limit: 5}, {path: b.parquet}]}\n")
    assert load(path).data.train == [DatasetConfig("a.jsonl", limit=5), DatasetConfig("b.parquet")]
    given = load(path, ["data.train=[{path: c.jsonl, name: c, answer: reward_model.ground_truth}]", "evaluation.sets=[{path: d.json}]"])
    assert given.data.train == [DatasetConfig("c.jsonl", name="c", answer="reward_model.ground_truth")]  # replaced, not mixed
    assert given.evaluation.sets == [EvaluationSetConfig("d.json")]
    assert load(path, ["data.train.1.limit=3"]).data.train == [DatasetConfig("a.jsonl", limit=5), DatasetConfig("b.parquet", limit=3)]


@pytest.mark.parametrize(
    "text, overrides, key, near",
    [
        ("rollout: {temprature: 1.0}", [], "rollout.temprature", "rollout.temperature"),
        ("rolout: {n: 2}", [], "rolout", "rollout.n"),
        ("", ["rollout.max_token=3"], "rollout.max_token", "rollout.max_tokens"),
        ("", ["max_prompts_step=3"], "max_prompts_step", "rollout.max_prompts_per_step"),
        ("", ["parallel.tensor_model_parallel=2"], "parallel.tensor_model_parallel", "parallel.tensor_model_parallel_size"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(write, text, overrides, key, near):
    path = write(LEAST + text)
    error = wrong(path, *overrides)
    assert f"unknown setting {key} " in error.problem and str(path) in error.problem and error.mend == f"did you mean {near}?"


def test_an_unknown_setting_that_is_near_to_none(write):
    error = wrong(write(LEAST), "zzz=1")
    assert "unknown setting zzz" in error.problem and "settings.py" in error.mend


def test_an_unknown_setting_of_a_data_set(write):
    assert "unknown setting" in wrong(write(LEAST), "data.train=[{pth: a.jsonl}]").problem


@pytest.mark.parametrize(
    "override, value",
    [
        ("rollout.n=two", "two"), ("rollout.n=2.5", "2.5"), ("rollout.n=", "Optional"), ("rollout.n=null", "Optional"),
        ("optimizer.lr=fast", "fast"), ("resume=maybe", "maybe"), ("data.instruction=a: b", "{'a': 'b'}"), ("model=null", "None"),
        ("run_dir=${model.pat}", "model.pat"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named_with_key_and_value(write, override, value):
    error = wrong(write(LEAST), override)
    assert error.problem.startswith(override.split("=")[0] + ": ") and value in error.problem


@pytest.mark.parametrize(
    "text, key",
    [
        ("run_dir: a\n", "model.path"),
        ("model: {path: m}\n", "run_dir"),
        ("", "run_dir"),
        (LEAST + "data: {train: [{path: a}, {name: b}]}\n", "data.train[1].path"),
    ],
)
def test_a_missing_value_is_named(write, text, key):
    error = wrong(write(text))
    assert error.problem.startswith(f"{key} has no value") and f"{key}=..." in error.mend


@pytest.mark.parametrize(
    "text", ["a: [b\n", "\ta: b\n", "- a\n- b\n", "12\n", LEAST + "run_dir: twice\n", LEAST + "data: {train: {path: a}}\n"]
)
def test_bad_yaml_names_the_file(write, text):
    path = write(text)
    assert str(path) in wrong(path).problem


def test_no_file_and_no_override(write, tmp_path):
    assert "no config file at" in wrong(tmp_path / "none.yaml").problem
    assert "no config file at" in wrong(tmp_path).problem
    assert "'train.steps'" in wrong(write(LEAST), "train.steps").problem


def test_load_checks(write):
    assert wrong(write(LEAST), "rollout.n=0").problem == "rollout.n is 0"


def test_saved_and_loaded_is_the_same(write, tmp_path):
    text = LEAST + 'data: {train: [{path: "a: b.jsonl", limit: 3}], instruction: "Answer in \\\\boxed{}.\\n", system: null}\n'
    config = load(write(text), ["optimizer.lr=1e-7", "rollout.top_p=0.95", "evaluation.sets=[{path: c}]", "logging.name='12'"])
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config and config.data.instruction == "Answer in \\boxed{}.\n"
    again = copy.deepcopy(config)
    save(load(tmp_path / "saved.yaml"), tmp_path / "twice.yaml")
    assert (tmp_path / "twice.yaml").read_text() == (tmp_path / "saved.yaml").read_text() and config == again


def test_known_keys_are_all_leaves():
    keys = known_keys()
    assert {"run_dir", "rollout.n", "data.train", "evaluation.sets", "objective.correction.cap"} <= set(keys)
    assert len(keys) == len(set(keys)) and "rollout" not in keys


@pytest.mark.parametrize(
    "dataset, name",
    [
        (DatasetConfig("data/train.jsonl"), "train"), (DatasetConfig("x/y.parquet"), "y"), (DatasetConfig("openai/gsm8k"), "gsm8k"),
        (DatasetConfig("org/MATH-2.5"), "MATH-2.5"), (DatasetConfig("a.json", name="mine"), "mine"),
    ],
)  # fmt: skip
def test_dataset_name(dataset, name):
    assert dataset_name(dataset) == name


def test_the_window_holds_the_longest_prompt_and_answer():
    config = Config()
    config.data.max_prompt_length, config.rollout.max_tokens = 100, 50
    assert (max_answer_length(config), max_model_len(config)) == (50, 150)
    config.evaluation.max_tokens = 80
    assert (max_answer_length(config), max_model_len(config)) == (80, 180)
    config.evaluation.max_tokens = 20
    assert max_answer_length(config) == 50


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_examples_load(file):
    assert load(file).run_dir


@pytest.mark.parametrize("key, first", [("objective", "objective.name"), ("objective.correction", "objective.correction.method")])
def test_a_value_in_place_of_a_section(write, key, first):
    outer, _, inner = key.partition(".")
    for error in (
        wrong(write(LEAST + f"{outer}: {{{inner}: grpo}}\n" if inner else LEAST + f"{outer}: grpo\n")),
        wrong(write(LEAST), f"{key}=grpo"),
    ):
        assert str(error).startswith(f"{key}: 'grpo' where a section belongs (") and f"set {first}" in str(error)

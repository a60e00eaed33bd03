"""examples/arithmetic: worked answers are right, the held-out questions are in no other stream, the tokenizer is lossless."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.support import load_example

EXAMPLE = Path(__file__).parents[3] / "examples" / "arithmetic"
make_data, make_model, make_tokenizer = (load_example(f"arithmetic/make_{name}.py") for name in ("data", "model", "tokenizer"))
EQUATION = re.compile(r"([\d*+-]+)=(\d+)")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model.write(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    """As transformers loads it beside a Qwen2 config, for which it has a class of its own."""
    return AutoTokenizer.from_pretrained(model)


def formula_in(problem: str) -> str:
    """The formula, read back from the wording."""
    for word, sign in ((" times ", "*"), (" plus ", "+"), (" minus ", "-")):
        problem = problem.replace(word, sign)
    return re.search(r"\d+\*\d+[+-]\d+", problem).group()


@pytest.mark.parametrize("split", make_data.SPLITS)
def test_every_worked_step_and_the_box_are_right(split):
    for row in make_data.rows(split, 3000, seed=5):
        value = eval(formula_in(row["problem"]))
        equations = EQUATION.findall(row["solution"])
        assert all(eval(left) == int(right) for left, right in equations)
        assert int(row["answer"]) == int(equations[-1][1]) == value >= 0
        assert row["solution"].endswith(f"\\boxed{{{value}}}")


def test_both_ways_of_working_occur_in_every_wording():
    seen = {}
    for row in make_data.rows("train", 2000):
        wording = re.sub(r"\d+", "N", row["problem"])
        seen.setdefault(wording, set()).add(row["solution"].count("="))
    assert len(seen) == 2 * len(make_data.WORDINGS)  # each with plus and with minus
    assert all(counts == {1, 4} for counts in seen.values())


def test_held_out_questions_are_in_no_other_stream():
    heldout = {formula_in(row["problem"]) for row in make_data.rows("heldout", make_data.SIZES["heldout"])}
    train = {formula_in(row["problem"]) for row in make_data.rows("train", make_data.SIZES["train"])}
    prompts = {formula_in(row["problem"]) for row in make_data.rows("prompts", make_data.SIZES["prompts"])}
    assert len(heldout) > 0.9 * make_data.SIZES["heldout"]  # a formula may come in two wordings
    assert not heldout & train and not heldout & prompts and not train & prompts


def test_written_files_share_no_formula_in_any_wording(tmp_path):
    """The disjointness of what is on disk, read back from the question texts and not from the ids."""
    make_data.write(tmp_path, {"train": 4000, "prompts": 4000, "heldout": 256}, seed=3)
    formulas = [
        {formula_in(json.loads(line)["problem"]) for line in (tmp_path / f"{name}.jsonl").open()}
        for name in ("worked", "prompts", "heldout")
    ]
    assert all(formulas)
    assert len(set.union(*formulas)) == sum(map(len, formulas))


@pytest.mark.slow
def test_the_shipped_files_are_those_of_the_script_and_disjoint(tmp_path):
    make_data.write(tmp_path, make_data.SIZES, seed=1)
    formulas = {}
    for name in ("prompts", "heldout"):
        shipped = (EXAMPLE / f"{name}.jsonl").read_text()
        assert shipped == (tmp_path / f"{name}.jsonl").read_text()
        formulas[name] = {formula_in(json.loads(line)["problem"]) for line in shipped.splitlines()}
    assert len(formulas["heldout"]) > 200 and not formulas["heldout"] & formulas["prompts"]


def test_rows_are_reproducible_and_the_seed_matters():
    def ids(seed):
        return [row["problem"] for row in make_data.rows("prompts", 200, seed)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_held_out_file_does_not_depend_on_the_seed(tmp_path):
    for seed in (1, 2):
        command = [EXAMPLE / "make_data.py", tmp_path / str(seed), "--train", "10", "--prompts", "10", "--seed", str(seed)]
        subprocess.run([sys.executable, *command], check=True)
    read = [{p.name: p.read_text() for p in (tmp_path / str(seed)).iterdir()} for seed in (1, 2)]
    assert read[0].keys() == {f"{name}.jsonl" for name, _, _ in make_data.FILES}
    assert read[0]["heldout.jsonl"] == read[1]["heldout.jsonl"]
    assert read[0]["prompts.jsonl"] != read[1]["prompts.jsonl"]
    assert read[0]["mixed.jsonl"] != read[1]["mixed.jsonl"]


def test_tokenizer_is_lossless(tokenizer):
    assert len(tokenizer) == make_tokenizer.SIZE
    for row in make_data.rows("train", 1000):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["solution"]}], tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    text = "".join(map(chr, range(32, 127))) + "\nWhat is  \\boxed{x, y. }  times users, é 数"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokenizer_on_disk_is_what_transformers_makes_of_it(model, tokenizer):
    """transformers rebuilds a Qwen2 tokenizer from vocabulary and merges: the file says the same."""
    built = make_tokenizer.build()
    for row in make_data.rows("train", 200):
        assert tokenizer(row["solution"], add_special_tokens=False)["input_ids"] == built.encode(row["solution"]).ids


def test_digits_are_single_tokens_and_answers_are_short(tokenizer):
    assert len(tokenizer("4096", add_special_tokens=False)["input_ids"]) == 4
    lengths = [len(tokenizer(row["solution"], add_special_tokens=False)["input_ids"]) for row in make_data.rows("train", 1000)]
    assert min(lengths) >= 10 and max(lengths) <= 60


def test_chat_template_is_chatml(tokenizer):
    chat = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "2?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nSum.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"


def test_fresh_model_matches_its_tokenizer(model, tokenizer):
    config = AutoConfig.from_pretrained(model)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert (model / "model.safetensors").stat().st_size < 10e6

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
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer.write(folder)
    return AutoTokenizer.from_pretrained(folder)


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
    assert all(counts == {1, 2} for counts in seen.values())


def test_held_out_questions_are_in_no_other_stream():
    heldout = {formula_in(row["problem"]) for row in make_data.rows("heldout", make_data.SIZES["heldout"])}
    train = {formula_in(row["problem"]) for row in make_data.rows("train", make_data.SIZES["train"])}
    prompts = {formula_in(row["problem"]) for row in make_data.rows("prompts", make_data.SIZES["prompts"])}
    assert len(heldout) > 0.9 * make_data.SIZES["heldout"]  # a formula may come in two wordings
    assert not heldout & train and not heldout & prompts and not train & prompts


def test_written_files_share_no_formula_in_any_wording(tmp_path):
    """The disjointness of what is on disk, read back from the question texts and not from the ids."""
    make_data.write(tmp_path, {"train": 4000, "prompts": 4000, "heldout": 256}, seed=3)
    formulas = [{formula_in(json.loads(line)["problem"]) for line in (tmp_path / f"{split}.jsonl").open()} for split in make_data.SPLITS]
    assert all(formulas)
    assert len(set.union(*formulas)) == sum(map(len, formulas))


def test_rows_are_reproducible_and_the_seed_matters():
    def ids(seed):
        return [row["problem"] for row in make_data.rows("prompts", 200, seed)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_held_out_file_does_not_depend_on_the_seed(tmp_path):
    for seed in (1, 2):
        command = [EXAMPLE / "make_data.py", tmp_path / str(seed), "--sft", "10", "--prompts", "10", "--seed", str(seed)]
        subprocess.run([sys.executable, *command], check=True)
    read = [{p.name: p.read_text() for p in (tmp_path / str(seed)).iterdir()} for seed in (1, 2)]
    assert read[0].keys() == {"train.jsonl", "prompts.jsonl", "heldout.jsonl"}
    assert read[0]["heldout.jsonl"] == read[1]["heldout.jsonl"]
    assert read[0]["prompts.jsonl"] != read[1]["prompts.jsonl"]
    assert read[0]["train.jsonl"] != read[1]["train.jsonl"]


def test_tokenizer_is_lossless_and_knows_every_token(tokenizer):
    assert len(tokenizer) < 128
    for row in make_data.rows("train", 1000):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["solution"]}], tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode([i]) for i in ids) == text


def test_tokenizer_reads_all_printable_ascii(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\nWhat is  \\boxed{x, y. }  times users"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id in tokenizer("é", add_special_tokens=False)["input_ids"]


def test_digits_are_single_tokens_and_answers_are_short(tokenizer):
    assert len(tokenizer("4096", add_special_tokens=False)["input_ids"]) == 4
    lengths = [len(tokenizer(row["solution"], add_special_tokens=False)["input_ids"]) for row in make_data.rows("train", 1000)]
    assert min(lengths) >= 10 and max(lengths) <= 40


def test_chat_template_is_chatml(tokenizer):
    chat = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "2?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nSum.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"


def test_fresh_model_matches_its_tokenizer(tmp_path, tokenizer):
    make_model.write(tmp_path, seed=1)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.vocab_size >= len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6
    assert AutoTokenizer.from_pretrained(tmp_path)("7")["input_ids"] == tokenizer("7")["input_ids"]

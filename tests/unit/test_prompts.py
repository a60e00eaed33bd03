"""Prompts: rows from files, the chat template, the filters, the cursor, and the one-line errors."""

import json
import os
from pathlib import Path

import pytest

from megatron_nft.config import DataConfig, DatasetConfig, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.prompts import Cursor, PromptSet, chat_text, load_prompts, load_rows, load_tokenizer
from megatron_nft.trajectories import Prompt

REAL = Path(os.environ.get("MEGATRON_NFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A byte-level tokenizer: one token a character, and one for each special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


def problems(*pairs):
    return [{"id": number, "problem": question, "answer": answer} for number, (question, answer) in enumerate(pairs)]


def test_rows_are_strings_with_ids_from_column_index_or_number(tmp_path):
    dataset = jsonl(
        tmp_path / "a.jsonl",
        {"id": 7, "problem": " 1+1? ", "answer": 2, "solution": "two"},
        {"extra_info": {"index": 31}, "problem": "2+2?", "answer": "4"},
        {"problem": "x?", "answer": None},
    )
    assert load_rows(dataset) == [
        {"id": "7", "question": "1+1?", "answer": "2", "solution": "two"},
        {"id": "31", "question": "2+2?", "answer": "4"},
        {"id": "2", "question": "x?", "answer": ""},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_verl_columns_are_read_from_every_kind_of_file(tmp_path, kind):
    raw = [{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": f"q{n}"}],
            "reward_model": {"ground_truth": str(n)}, "extra_info": {"index": n + 10}} for n in range(3)]  # fmt: skip
    path = tmp_path / f"set.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(raw), path)
    else:
        path.write_text(json.dumps(raw) if kind == "json" else "\n".join(map(json.dumps, raw)))
    rows = load_rows(DatasetConfig(path=str(path), question="prompt", answer="reward_model.ground_truth", limit=2))
    assert rows == [
        {"id": "10", "question": "q0", "answer": "0", "turns": [{"role": "system", "content": "S"}]},
        {"id": "11", "question": "q1", "answer": "1", "turns": [{"role": "system", "content": "S"}]},
    ]


def test_a_line_separator_inside_a_string_does_not_split_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "a\u2028b", "answer": "1"}\r\n\n{"problem": "c", "answer": "2"}', encoding="utf-8")
    assert [row["question"] for row in load_rows(DatasetConfig(path=str(path)))] == ["a\u2028b", "c"]


def test_a_hub_name_and_a_directory_of_data_go_through_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([{"problem": f"q{n}", "answer": str(n)} for n in range(5)])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: asked.append((given, named)) or table)
    rows = load_rows(DatasetConfig(path="owner/name", split="test", subset="main", limit=3))
    assert asked == [(("owner/name", "main"), {"split": "test"})]
    assert [row["answer"] for row in rows] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "said"),
    [
        ("missing.jsonl", None, {}, "no data file at"),
        ("a.csv", b"problem,answer\n", {}, "no data file of a known kind"),
        ("a.jsonl", b'{"problem": "q", "answer": "1"}\n\n{"problem": ', {}, "line 3 of"),
        ("a.jsonl", b'{"problem": "q", "answer": "1"}\n[1]\n', {}, "line 2 of"),
        ("a.json", b'{"problem": "q"}', {}, "no list of JSON objects"),
        ("a.jsonl", b'{"problem": "\xff\xfe", "answer": "1"}\n', {}, "is not UTF-8 (byte 13)"),
        ("a.parquet", b"PAR1 this is not parquet", {}, "cannot be read as parquet"),
        ("a.jsonl", b'{"query": "q", "answer": "1", "meta": {"level": 3}}\n', {}, "no column problem; it has query, answer, meta.level"),
        ("a.jsonl", b'{"problem": "q", "rm": {"gold": "1"}}\n', {"answer": "rm.truth"}, "no column rm.truth; it has problem, rm.gold"),
        ("a.jsonl", b'{"problem": {"text": "q"}, "answer": "1"}\n', {}, "column problem in row 0"),
        ("a.jsonl", b'{"problem": [{"role": "assistant", "content": "q"}], "answer": "1"}\n', {}, "does not end in a turn of the user"),
        ("a.jsonl", b'{"problem": ["q", "r"], "answer": "1"}\n', {}, "not of {role, content}"),
        ("a.jsonl", b'{"id": 1, "problem": "q", "answer": "1"}\n{"id": "1", "problem": "r", "answer": "1"}\n', {}, "have the id '1'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, name, content, settings, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_rows(DatasetConfig(path=str(tmp_path / name), **settings))
    assert said in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreachable_hub_name_and_a_path_that_is_nowhere_are_user_errors(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"cannot load the data set owner/name, split train \(offline\)"):
        load_rows(DatasetConfig(path="owner/name"))
    with pytest.raises(UserError, match="no data set at no/such/place"):
        load_rows(DatasetConfig(path="no/such/place"))


def test_names():
    assert dataset_name(DatasetConfig(path="data/math500.jsonl")) == "math500"
    assert dataset_name(DatasetConfig(path="owner/DAPO-v1.5")) == "DAPO-v1.5"
    assert dataset_name(DatasetConfig(path="data/math500.jsonl", name="m")) == "m"


def test_the_prompt_is_the_chat_template_with_generation_prompt(tmp_path, tokenizer):
    dataset = jsonl(tmp_path / "sums.jsonl", *problems(("1+1?", "2")))
    prompt = load_prompts([dataset], tokenizer, DataConfig(system="Be brief.", instruction="Box it."))[0]
    assert (prompt.id, prompt.question, prompt.answer, prompt.source) == ("sums/0", "1+1?", "2", "sums")
    assert tokenizer.decode(prompt.token_ids) == "<|system|>Be brief.<|end|><|user|>1+1?\nBox it.<|end|><|assistant|>"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?\nBox it."}]
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_earlier_turns_are_kept_and_the_configured_system_turn_wins(tokenizer):
    turns = [{"role": "system", "content": "old"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat_text("q", tokenizer, DataConfig(), turns).startswith("<|system|>old<|end|><|user|>a<|end|>")
    assert chat_text("q", tokenizer, DataConfig(system="new"), turns).startswith("<|system|>new<|end|><|user|>a<|end|>")
    with pytest.raises(UserError, match="refuses a conversation of tool, user .no tools here"):
        chat_text("q", tokenizer, DataConfig(), [{"role": "tool", "content": "x"}])


def test_filters_drop_and_count(tmp_path, tokenizer):
    rows = problems(("a", "1"), ("a", "1"), ("b  c", "1"), ("b c ", "2"), ("d", ""), ("", "3"), ("x" * 50, "4"), ("e", "5"), ("d", "6"))
    dataset = jsonl(tmp_path / "s.jsonl", *rows)
    loaded = load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=13))
    assert [prompt.id for prompt in loaded] == ["s/0", "s/7", "s/8"]
    assert loaded.dropped == {"empty": 2, "conflicting": 2, "duplicate": 1, "too_long": 1}
    assert loaded.told == " (dropped: empty 2, conflicting 2, duplicate 1, too_long 1)" and PromptSet([], {"empty": 0}).told == ""
    assert len(loaded) + sum(loaded.dropped.values()) == len(rows)


def test_the_length_limit_counts_the_tokens_of_the_whole_prompt(tmp_path, tokenizer):
    dataset = jsonl(tmp_path / "s.jsonl", *problems(("12345", "1")))
    length = len("12345") + 3  # <|user|>, <|end|>, <|assistant|>
    assert len(load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=length))[0].token_ids) == length
    with pytest.raises(UserError, match="no usable prompts among the 1 rows of .*too_long 1"):
        load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=length - 1))


def test_several_sets_need_different_names(tmp_path, tokenizer):
    (tmp_path / "other").mkdir()
    first = jsonl(tmp_path / "s.jsonl", *problems(("a", "1")))
    second = jsonl(tmp_path / "other" / "s.jsonl", *problems(("b", "2"), ("a", "1")))
    with pytest.raises(UserError, match="2 data sets have the name s"):
        load_prompts([first, second], tokenizer, DataConfig())
    second.name = "t"
    loaded = load_prompts([first, second], tokenizer, DataConfig())
    assert [(prompt.id, prompt.source) for prompt in loaded] == [("s/0", "s"), ("t/0", "t")]
    assert loaded.dropped["duplicate"] == 1


def test_no_data_set_no_tokenizer_no_template(tmp_path, tokenizer, tokenizer_dir):
    with pytest.raises(UserError, match="no data set is given"):
        load_prompts([], tokenizer, DataConfig())
    with pytest.raises(UserError, match="no model directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tokenizer_dir / name).read_text())
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)


def prompt_set(n):
    return PromptSet([Prompt(str(i), f"q{i}", str(i), (i,), "s") for i in range(n)])


def test_the_cursor_visits_each_prompt_once_an_epoch_in_an_order_of_the_seed_and_epoch():
    taken = [prompt.id for prompt in Cursor(prompt_set(20), seed=3).take(40)]
    first, second = taken[:20], taken[20:]
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(20))
    assert first != second and first != [str(i) for i in range(20)]
    assert [prompt.id for prompt in Cursor(prompt_set(20), seed=3).take(40)] == taken
    assert [prompt.id for prompt in Cursor(prompt_set(20), seed=4).take(40)] != taken
    assert [prompt.id for prompt in Cursor(prompt_set(3), seed=3, shuffle=False).take(7)] == list("0120120")


@pytest.mark.parametrize("before", [0, 5, 20, 33])
def test_a_restored_cursor_goes_on_where_the_saved_one_stood(before):
    saved = Cursor(prompt_set(20), seed=3)
    saved.take(before)
    state = json.loads(json.dumps(saved.state_dict()))
    restored = Cursor(prompt_set(20), seed=99, shuffle=False)
    restored.load_state_dict(state)
    assert [restored.take(n) for n in (1, 7, 30)] == [saved.take(n) for n in (1, 7, 30)]
    assert restored.state_dict() == saved.state_dict()


def test_changed_prompts_are_refused_at_resume():
    state = Cursor(prompt_set(20), seed=3).state_dict()
    with pytest.raises(UserError, match="prompts changed since the checkpoint .20 then, 19 now"):
        Cursor(prompt_set(19), seed=3).load_state_dict(state)
    other = prompt_set(20)
    other.prompts[4] = Prompt("4", "q4", "another gold", (4,), "s")
    with pytest.raises(UserError, match="prompts changed"):
        Cursor(other, seed=3).load_state_dict(state)


@pytest.mark.skipif(not (REAL / "dapo_math_17k.parquet").exists(), reason="the real data is not on this machine")
def test_the_published_training_set(tokenizer):
    path = str(REAL / "dapo_math_17k.parquet")
    dataset = DatasetConfig(path=path, question="prompt", answer="reward_model.ground_truth")
    loaded = load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=4096))
    assert len(loaded) + sum(loaded.dropped.values()) == 17917
    assert loaded.dropped | {"too_long": 0} == {"empty": 0, "conflicting": 24, "duplicate": 717, "too_long": 0}
    assert len({prompt.question for prompt in loaded}) == len({prompt.id for prompt in loaded}) == len(loaded)
    assert any(prompt.answer.startswith("-") for prompt in loaded)

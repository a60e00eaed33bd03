"""Prompts: the filters, the length limit, the cursor, and the one-line errors."""

import json

import pytest

from megatron_nft.config import DataConfig, DatasetConfig, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.prompts import Cursor, PromptSet, load_prompts, load_sets, load_tokenizer
from megatron_nft.trajectories import Prompt
from tests.support import REAL, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


def problems(*pairs):
    return [{"id": number, "problem": question, "answer": answer} for number, (question, answer) in enumerate(pairs)]


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


def test_filters_drop_and_count(tmp_path, tokenizer):
    rows = problems(("a", "1"), ("a", "1"), ("b  c", "1"), ("b c ", "2"), ("d", ""), ("", "3"), ("x" * 50, "4"), ("e", "5"), ("d", "6"))
    dataset = jsonl(tmp_path / "s.jsonl", *rows)
    loaded = load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=13))
    assert [prompt.id for prompt in loaded] == ["s/0", "s/7", "s/8"]
    assert loaded.dropped == {"empty": 2, "conflicting": 2, "duplicate": 1, "too_long": 1}
    assert (
        loaded.told == " (dropped: empty 2, conflicting 2, duplicate 1, too_long 1, the longest has 53 tokens)"
        and PromptSet([], {"empty": 0}).told == ""
    )
    assert len(loaded) + sum(loaded.dropped.values()) == len(rows)


def test_equal_golds_in_different_spelling_are_no_conflict_and_different_golds_are(tmp_path, tokenizer):
    same = [("a", "$025$"), ("a", "25.0"), ("b", r"\dfrac{1}{2}"), ("b", r"\frac{1}{2} "), ("c", "1,000"), ("c", "1000")]
    other = [("d", "1,2"), ("d", "12"), ("e", "-3"), ("e", "3"), ("f", "x"), ("f", "X")]
    loaded = load_prompts([jsonl(tmp_path / "s.jsonl", *problems(*same, *other))], tokenizer, DataConfig())
    assert [(prompt.question, prompt.answer) for prompt in loaded] == [("a", "$025$"), ("b", r"\dfrac{1}{2}"), ("c", "1,000")]
    assert loaded.dropped == {"empty": 0, "conflicting": 6, "duplicate": 3, "too_long": 0}


def test_several_golds_and_the_verdict_function_of_each_source(tmp_path, tokenizer):
    rows = [
        {"problem": "a", "answer": ["1", "", "2", "1"], "from": "gsm"},
        {"problem": "b", "answer": "3", "from": "math"},
        {"problem": "c", "answer": []},
        {"problem": "a", "answer": ["2", "1"], "from": "gsm"},
    ]
    rows = [row | {"from": row.get("from", "?")} for row in rows]
    dataset = jsonl(tmp_path / "s.jsonl", *rows)
    dataset.source, dataset.reward, dataset.rewards = "from", "strict_box", {"math": "math_verify"}
    loaded = load_prompts([dataset], tokenizer, DataConfig())
    assert [(p.golds, p.reward, p.source) for p in loaded] == [(("1", "2"), "strict_box", "s"), (("3",), "math_verify", "s")]
    assert loaded.dropped == {"empty": 1, "conflicting": 0, "duplicate": 1, "too_long": 0}
    assert load_prompts([jsonl(tmp_path / "t.jsonl", rows[1])], tokenizer, DataConfig())[0].reward is None


def test_excluded_ids_leave_out_their_questions_with_all_their_rows(tmp_path, tokenizer):
    dataset = jsonl(tmp_path / "s.jsonl", *problems(("a", "1"), ("b", "2"), ("a ", "1"), ("c", "3")))
    (tmp_path / "ids.txt").write_text("s/2\n\nelsewhere/1\n")
    data = DataConfig(exclude=str(tmp_path / "ids.txt"))
    loaded = load_prompts([dataset], tokenizer, data)
    assert [prompt.question for prompt in loaded] == ["b", "c"]
    assert loaded.dropped == {"empty": 0, "conflicting": 0, "duplicate": 0, "excluded": 2, "too_long": 0}
    assert len(load_sets([dataset], tokenizer, data)["s"]) == 3
    for content, said in (("t/1\n", "none of the 1 ids of data.exclude"), ("\n", "holds no id"), (None, "no text file at")):
        (tmp_path / "ids.txt").write_text(content) if content else (tmp_path / "ids.txt").unlink()
        with pytest.raises(UserError, match=said):
            load_prompts([dataset], tokenizer, data)


def test_the_lengths_are_told_with_those_that_were_dropped(tmp_path, tokenizer):
    dataset = jsonl(tmp_path / "s.jsonl", *problems(*[("x" * n, "1") for n in range(1, 101)]))
    loaded = load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=93))  # three tokens are the template's
    assert loaded.dropped["too_long"] == 10 and loaded.lengths == [n + 3 for n in range(1, 101)]
    assert loaded.length_table == "tokens: median 54, 90 % 94, 99 % 103, longest 103"
    with pytest.raises(UserError, match="too_long 100; the shortest prompt has 4 tokens"):
        load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=3))


def test_alternatives_are_part_of_the_fingerprint():
    one, two = (PromptSet([Prompt("1", "q", "1", (1,), "s", golds)]) for golds in ((), ("2",)))
    assert one.fingerprint != two.fingerprint == PromptSet([Prompt("1", "q", "1", (9,), "s", ("2",))]).fingerprint


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
    dataset = jsonl(tmp_path / "s.jsonl", *problems(("a", "1")))
    bare = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no chat template.*data.template"):
        load_prompts([dataset], bare, DataConfig())
    assert len(load_prompts([dataset], bare, DataConfig(template="plain"))) == 1


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


REAL_DATA = pytest.mark.skipif(not (REAL / "dapo_math_17k.parquet").exists(), reason="the real data is not on this machine")


@pytest.mark.slow
@REAL_DATA
def test_the_published_training_set(tokenizer):
    dataset = DatasetConfig(benchmark="dapo_math_17k", path=str(REAL / "dapo_math_17k.parquet"))
    loaded = load_prompts([dataset], tokenizer, DataConfig(max_prompt_length=4096))
    assert len(loaded) + sum(loaded.dropped.values()) == 17917
    assert loaded.dropped | {"too_long": 0} == {"empty": 0, "conflicting": 24, "duplicate": 717, "too_long": 0}
    assert len({prompt.question for prompt in loaded}) == len({prompt.id for prompt in loaded}) == len(loaded)
    assert any(prompt.answer.startswith("-") for prompt in loaded)

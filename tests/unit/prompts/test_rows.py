"""Rows of files and of the hub: columns, golds, published layouts, and the one-line errors."""

import json
import tracemalloc

import pytest

from megatron_nft.config import DatasetConfig
from megatron_nft.errors import UserError
from megatron_nft.prompts.instructions import DAPO_AFTER, DAPO_BEFORE
from megatron_nft.prompts.rows import load_rows, read_rows
from tests.support import REAL

REAL_DATA = pytest.mark.skipif(not (REAL / "gsm8k_test.jsonl").exists(), reason="the real data is not on this machine")


def jsonl(path, *rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path), **settings)


def parquet(path, rows, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


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
        ("a.jsonl", b'{"problem": "q", "answer": "1"}\n{"problem": "\x00", "answer": "1"}\n', {}, "line 2 of"),
        ("a.jsonl", b'{"problem": "q\\u0000r", "answer": "1"}\n', {}, "column problem in row 0 of"),
        ("a.jsonl", b'{"problem": "q", "answer": "\\ud835"}\n', {}, "holds half of a surrogate pair: mend"),
        ("a.jsonl", b'{"problem": "q", "answer": ' + b"9" * 5000 + b"}\n", {}, "line 1 of"),
        ("a.jsonl", b'{"problem": "q", "answer": "1"}\n' * 3 + b'{"problem": "\xff"}', {}, "is not UTF-8 (byte 109)"),
        ("a.jsonl", '{"problem": "q", "answer": "1"}\n'.encode("utf-16"), {}, "is not UTF-8 (byte 0)"),
        ("a.jsonl", b'{"problm": "q", "answer": "1"}\n', {}, "set question of the data set to problm?"),
        ("a.jsonl", b'{"question": "q", "answer": "1"}\n', {}, "it has question, answer: set question of the data set to question?"),
        ("a.jsonl", b'{"problem": "q", "final_answer": "1"}\n', {}, "set answer of the data set to final_answer?"),
        (
            "a.jsonl",
            b'{"problem": "q", "reward_model": {"ground_truth": "1"}}\n',
            {},
            "set answer of the data set to reward_model.ground_truth?",
        ),
        ("a.jsonl", b'{"problem": "q", "answer": "1", "uid": 3}\n', {"id": "uuid"}, "set id of the data set to uid?"),
        ("a.jsonl", b'{"problem": "q", "answer": "1"}\n', {"source": "from"}, "no column from"),
        ("a.jsonl", b'{"problem": "q", "answer": [["1"]]}\n', {}, "column answer in row 0"),
        ("a.jsonl", b'{"problem": "q", "answer": "1"}\n[1]\n', {}, "line 2 of"),
        ("a.json", b'{"problem": "q"}', {}, "no list of JSON objects"),
        ("a.jsonl", b'{"problem": "\xff\xfe", "answer": "1"}\n', {}, "is not UTF-8 (byte 13)"),
        ("a.parquet", b"PAR1 this is not parquet", {}, "cannot be read as parquet"),
        ("a.jsonl", b'{"query": "q", "answer": "1", "meta": {"level": 3}}\n', {}, "no column problem; it has query, answer, meta.level"),
        ("a.jsonl", b'{"problem": "q", "rm": {"gold": "1"}}\n', {"answer": "rm.truth"}, "no column rm.truth; it has problem, rm.gold"),
        ("a.jsonl", b'{"problem": {"text": "q"}, "answer": "1"}\n', {}, "column problem in row 0"),
        ("a.jsonl", b'{"problem": [{"role": "assistant", "content": "q"}], "answer": "1"}\n', {}, "does not end in a turn of the user"),
        ("a.jsonl", b'{"problem": ["q", "r"], "answer": "1"}\n', {}, "not of {role, content}"),
        ("a.jsonl", b'{"problem": [{"role": {}, "content": "s"}, {"role": "user", "content": "q"}], "answer": "1"}\n', {}, "not of {role"),
        ("a.jsonl", b'{"id": "a\\nb", "problem": "q", "answer": "1"}\n', {}, "the id in row 0 of"),
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


@pytest.mark.parametrize(
    ("answer_from", "column", "gold"),
    [
        ("hash", "3 #### 4 is so.\n#### 1,234,567", "1234567"),
        ("hash", "so\n#### -3.5 ", "-3.5"),
        ("hash", "#### (1,23)", "(1,23)"),
        ("hash", "no mark", ""),
        ("box", r"\boxed{1} and $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        ("box", "no box", ""),
        ("plain", " #### 4 ", "#### 4"),
        ("plain", 12345678901234567890123, "12345678901234567890123"),
    ],
)
def test_where_in_its_column_the_gold_is(tmp_path, answer_from, column, gold):
    row = load_rows(jsonl(tmp_path / "a.jsonl", {"problem": "q", "answer": column}, answer_from=answer_from))[0]
    assert row["answer"] == gold


def test_a_list_holds_several_golds(tmp_path):
    rows = [{"problem": "q", "answer": answer} for answer in (["a", None, "b", "a"], ["c"], [], [None])]
    found = load_rows(jsonl(tmp_path / "a.jsonl", *rows))
    assert [(row["answer"], row.get("alternatives", ())) for row in found] == [("a", ("b",)), ("c", ()), ("", ()), ("", ())]
    boxes = jsonl(tmp_path / "b.jsonl", {"problem": "q", "answer": [r"\boxed{1}", r"\boxed{2}"]}, answer_from="box")
    assert (load_rows(boxes)[0]["answer"], load_rows(boxes)[0]["alternatives"]) == ("1", ("2",))


def test_golds_of_benchmarks_of_integers_are_read_as_integers(tmp_path):
    golds = ["025", "1,234", 27.0, "+7", "-03", "0", "000"]
    dataset = jsonl(tmp_path / "a.jsonl", *[{"problem": str(gold), "answer": gold} for gold in golds], benchmark="aime24")
    assert [row["answer"] for row in load_rows(dataset)] == ["25", "1234", "27", "7", "-3", "0", "0"]
    with pytest.raises(UserError, match="gold '1/2', but those of aime24 are integers"):
        load_rows(jsonl(tmp_path / "b.jsonl", {"problem": "q", "answer": "1/2"}, benchmark="aime24"))


def test_ids_are_those_of_the_column_that_is_named(tmp_path):
    dataset = jsonl(tmp_path / "a.jsonl", {"problem": "q", "answer": "1", "id": 5, "meta": {"key": "k"}}, id="meta.key")
    assert load_rows(dataset)[0]["id"] == "k"


def test_published_instructions_come_off_where_they_are_asked_to(tmp_path):
    wrapped = [DAPO_BEFORE + "q?" + DAPO_AFTER, "q? Let's think step by step and output the final answer within \\boxed{}.", "q?"]
    rows = [{"problem": text, "answer": "1"} for text in wrapped]
    assert [row["question"] for row in load_rows(jsonl(tmp_path / "a.jsonl", *rows), strip=True)] == ["q?"] * 3
    assert [row["question"] for row in load_rows(jsonl(tmp_path / "a.jsonl", *rows))] == wrapped
    assert load_rows(jsonl(tmp_path / "a.jsonl", *rows, strip_instruction=False), strip=True)[0]["question"] == wrapped[0]
    assert load_rows(jsonl(tmp_path / "a.jsonl", *rows, strip_instruction=True))[0]["question"] == "q?"


def published_dapo(count, repeats):
    """Rows as DAPO-Math-17k has them: every problem many times, under one id."""
    return [
        {"data_source": "math_dapo", "prompt": [{"content": f"{DAPO_BEFORE}What is {n} + {n}?{DAPO_AFTER}", "role": "user"}],
         "ability": "MATH", "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
         "extra_info": {"index": f"id-{n}"}}
        for _ in range(repeats) for n in range(count)
    ]  # fmt: skip


def test_parquet_is_read_in_pieces_and_only_the_columns_that_are_asked_for(tmp_path):
    rows = [row | {"blob": "x" * 5000} for row in published_dapo(4, 1000)]
    path = parquet(tmp_path / "dapo.parquet", rows, row_group_size=1000)
    del rows
    dataset = DatasetConfig(benchmark="dapo_math_17k", path=str(path))
    next(read_rows(dataset))  # what is imported at the first call
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(dataset, strip=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 4000 and peak < 2 * 2**20  # all at once they are 2.9 MiB, with the column that is not read 26
    assert next(read_rows(dataset, strip=True)) == {"id": "id-0", "question": "What is 0 + 0?", "answer": "0"}


def test_a_parquet_file_without_a_column_names_those_it_has(tmp_path):
    path = parquet(tmp_path / "a.parquet", published_dapo(1, 1))
    with pytest.raises(UserError) as caught:
        load_rows(DatasetConfig(path=str(path), question="prompt"))
    assert "no column answer; it has data_source, prompt, ability, reward_model.ground_truth" in str(caught.value)
    assert "set answer of the data set to reward_model.ground_truth?" in str(caught.value)


def test_a_parquet_file_that_is_cut_off_or_damaged_is_told_in_one_line(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"problem": f"q{n}", "answer": "1"} for n in range(9000)], row_group_size=1000)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:4] + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as parquet") as caught:
            load_rows(DatasetConfig(path=str(path)))
        assert "\n" not in str(caught.value)


def test_the_hub_is_read_by_columns_in_pieces(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([row | {"blob": [1, 2]} for row in published_dapo(2, 1500)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: table)
    rows = load_rows(DatasetConfig(benchmark="dapo_math_17k", limit=2500), strip=True)
    assert len(rows) == 2500 and rows[1] == {"id": "id-1", "question": "What is 1 + 1?", "answer": "2"}


def test_a_row_of_10_mib_is_a_row(tmp_path):
    rows = load_rows(jsonl(tmp_path / "a.jsonl", {"problem": "x" * (10 << 20), "answer": "1"}, {"problem": "q", "answer": "2"}))
    assert [len(row["question"]) for row in rows] == [10 << 20, 1]


@REAL_DATA
def test_golds_that_are_cut_out_of_published_solutions():
    """Independent of our reading: the golds that stand beside the solutions in the files."""
    for name, answer_from in (("gsm8k_test", "hash"), ("gsm8k_train", "hash"), ("math500", "box")):
        plain = load_rows(DatasetConfig(path=str(REAL / f"{name}.jsonl")))
        cut = load_rows(DatasetConfig(path=str(REAL / f"{name}.jsonl"), answer="solution", answer_from=answer_from))
        assert [row["answer"] for row in cut] == [row["answer"] for row in plain]


@REAL_DATA
@pytest.mark.parametrize(
    ("name", "count"),
    [("aime24", 30), ("aime25", 30), ("amc23", 40), ("math500", 500), ("olympiadbench", 675), ("minerva", 272), ("gsm8k", 1319)],
)
def test_the_benchmarks_are_there_as_a_whole(name, count):
    from megatron_nft.config import EvaluationConfig, EvaluationSetConfig

    dataset = EvaluationConfig([EvaluationSetConfig(benchmark=name)], data_dir=str(REAL)).sets[0]
    rows = load_rows(dataset)
    assert len(rows) == len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == count
    assert all(row["answer"] for row in rows)

"""Contamination: which words count, runs in common, short problems, exact duplicates, the command, and the real data."""

import json
import os
import random
import re

import pytest

from megatron_nft.cli import main
from megatron_nft.config import DatasetConfig, load
from megatron_nft.prompts.contamination import Index, find_contamination, words_of
from megatron_nft.prompts.rows import load_rows
from tests.support import REAL


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"Find $\dfrac{x+1}{2}$, please.", r"find  $ \frac { x + 1 } { 2 } $ please"),
        (r"a 9-kilometer-long walk", "a 9 kilometer long walk"),
        (r"\left( a,\!b \right) \quad \text{cm}", "(a, b) \\mathrm{cm}"),
        ("- The gardener\n- chooses", "\u2022 the gardener \u2022 chooses".replace(" \u2022", "\n\u2022")),
        (r"$x \leq 3$", r"$x \le 3$"),
        ("x \u2212 1", "x-1"),
        ("\uff21\uff22\uff23 = \uff11", "ABC=1"),
        ("triangle $ABC$.", "Triangle $A B C$"),
    ],
)
def test_what_does_not_count(one, other):
    assert "".join(words_of(one)) == "".join(words_of(other))
    assert Index({"a": one}).find(other)["a"] == (1.0, True)


@pytest.mark.parametrize(
    ("one", "other"), [("z^4+z^2+1", "z^4-z^2+1"), ("x = 1", "x = 2"), ("a / b", "a b"), ("\u4e00\u4e8c", "\u4e00\u4e09")]
)
def test_what_counts(one, other):
    assert not Index({"a": one}).find(other).get("a", (0, False))[1]


def test_the_share_is_that_of_runs_in_common_counted_by_hand():
    problem = " ".join(f"w{n}" for n in "abcdefghijklmnop")  # 16 words: 4 runs of 13
    index = Index({"p": problem.replace("w", "")})
    words = problem.replace("w", "").split()
    assert index.find(" ".join(words[:13])) == {"p": (0.25, False)}
    assert index.find("before " + " ".join(words[1:]) + " after") == {"p": (0.75, False)}
    assert index.find(" ".join(words[:12])) == {}
    assert index.find(" ".join(words)) == {"p": (1.0, True)}
    assert index.find(" ".join([*words, "more"])) == {"p": (1.0, False)}


def test_a_short_problem_has_to_be_there_as_a_whole():
    index = Index({"p": "What is 2 + 3?", "empty": "?"})
    assert index.find("Tell me: what is $2+3$ in words?") == {"p": (1.0, False)}
    assert index.find("what is 2 + 4") == index.find("what is") == index.find("") == {}


def test_runs_of_any_length_are_found_as_by_comparing_everything():
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abc", k=draw.randint(1, 12))) for _ in range(60)]
    problems = {str(n): text for n, text in enumerate(texts[:30])}
    index = Index(problems, run=4)
    for text in texts[30:]:
        expected = {}
        for name, problem in problems.items():
            words = problem.split()
            runs = {" ".join(words[i : i + 4]) for i in range(len(words) - 3)} or {problem}
            common = sum(f" {run} " in f" {text} " for run in runs)
            if common or problem.replace(" ", "") == text.replace(" ", ""):
                expected[name] = (common / len(runs), problem == text)
        assert index.find(text) == expected


@pytest.fixture
def given(tmp_path):
    """A config whose training set holds one problem of each benchmark: as it is, as a part, and wrapped in an instruction."""

    def rows(name, questions):
        (tmp_path / name).write_text("".join(json.dumps({"problem": q, "answer": str(n + 1)}) + "\n" for n, q in enumerate(questions)))

    long = "Let p and q be the two real roots of the given quadratic equation and find their sum squared"
    rows("train.jsonl", ["What is 7 + 8? Let's think step by step and output the final answer within \\boxed{}.", f"{long} minus one.",
                         "Something else.", "What is 7+8?"])  # fmt: skip
    rows("aime24.jsonl", ["What is $7+8$?", "Untouched."])
    rows("math500.jsonl", [long + " if it exists at all.", "Untouched as well."])
    (tmp_path / "a.yaml").write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: none}}\ndata: {{train: [{{path: {tmp_path}/train.jsonl}}]}}\n"
        f"evaluation: {{data_dir: {tmp_path}}}\n"
    )
    return tmp_path


def test_the_command_writes_pairs_and_a_list_of_ids_that_leaves_nothing(given, capsys):
    path = str(given / "a.yaml")
    assert main(["contamination", path, "--ids", str(given / "ids.txt")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["aime24", "2", "1", "1", "1", "2"] in lines and ["math500", "2", "0", "1", "1", "1"] in lines
    found = json.loads((given / "run" / "contamination.json").read_text())
    assert found["training_questions"] == 4 and list(found["sets"]) == ["aime24", "math500"]
    assert found["sets"]["aime24"]["pairs"] == [
        {"problem": "aime24/0", "training": f"train/{n}", "share": 1.0, "exact": True} for n in (0, 3)
    ]
    pair = found["sets"]["math500"]["pairs"][0]
    assert (pair["problem"], pair["training"], pair["exact"]) == ("math500/0", "train/1", False) and 0.5 < pair["share"] < 1
    assert (given / "ids.txt").read_text().split() == ["train/0", "train/1", "train/3"]
    assert main(["contamination", path, f"data.exclude={given}/ids.txt", "--output", str(given / "again.json")]) == 0
    again = json.loads((given / "again.json").read_text())
    assert again["training_questions"] == 1 and not any(one["pairs"] for one in again["sets"].values())


def test_the_sets_of_the_evaluation_are_taken_where_they_are_named(given):
    config = load(given / "a.yaml", [f"evaluation.sets=[{{path: {given}/math500.jsonl, name: mine}}]"])
    found, count = find_contamination(config)
    assert count == 4 and list(found) == ["mine"] and found["mine"].count() == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluation.data_dir=null"], "there is nothing to compare the training data with"),
        (["evaluation.data_dir=/nowhere"], "no benchmark is in /nowhere"),
        (["data.train=[]"], "no data set is given"),
        (["--words", "0"], "--words is 0"),
        (["--share", "2"], "--share 2"),
        (["--output", "."], "cannot write ."),
        (["--output", "/dev/null"], "cannot write /dev/null: it is no file"),
        (["--ids", "/dev/null"], "cannot write /dev/null: it is no file"),
        (["--output", "x" * 300], "cannot write xxx"),
        (["evaluation.sets=[{benchmark: aime24}, {path: aime24}]"], "2 data sets have the name aime24"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(given)
    (given / "aime24").mkdir()
    (given / "aime24" / "a.jsonl").write_text('{"problem": "q", "answer": "1"}\n')
    assert main(["contamination", str(given / "a.yaml"), *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


LONG = os.environ.get("MEGATRON_NFT_LONG") == "1"


@pytest.mark.skipif(not (REAL / "dapo_math_17k.parquet").exists(), reason="the real data is not on this machine")
def test_the_published_training_set_holds_problems_of_the_benchmarks(tmp_path):
    """All that another comparison finds, by letters and digits alone, is found; the first rows alone but for the long tests."""
    training = f"{{benchmark: dapo_math_17k, path: {REAL}/dapo_math_17k.parquet, limit: {10**6 if LONG else 3000}}}"
    (tmp_path / "a.yaml").write_text(
        f"run_dir: {tmp_path}\nmodel: {{path: none}}\nevaluation: {{data_dir: {REAL}}}\ndata: {{train: [{training}]}}\n"
    )
    config = load(tmp_path / "a.yaml")
    found, count = find_contamination(config)
    bare = {re.sub(r"[\W_]+", "", row["question"].lower()) for row in load_rows(config.data.train[0])}
    for name in ("amc23", "math500", "olympiadbench", "aime25"):
        problems = load_rows(DatasetConfig(path=str(REAL / f"{name}.jsonl")))
        known = {f"{name}/{row['id']}" for row in problems if re.sub(r"[\W_]+", "", row["question"].lower()) in bare}
        assert known <= {pair.problem for pair in found[name].pairs if pair.exact or pair.share > 0.5}
    exact = {name: one.count(exact=True) for name, one in found.items() if one.count(exact=True)}
    assert exact and found["minerva"].count() == found["gsm8k"].count() == 0
    if LONG:
        assert count == 17176 and exact == {"amc23": 8, "math500": 7, "olympiadbench": 11} and found["amc23"].count(0.5) == 24

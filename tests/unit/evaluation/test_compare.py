"""Two evaluations side by side: differences, p-values, problems; what is refused."""

import json
from pathlib import Path

import numpy
import pytest

from megatron_nft.cli import main
from megatron_nft.errors import UserError
from megatron_nft.evaluation.compare import compare, difference

SETTINGS = {"greedy": True, "k": 4, "temperature": 1.0, "top_p": 0.7, "max_tokens": 9, "reward": "strict_box"}


def summary(correct: dict[str, list[int]], **settings) -> dict:
    """Results in which a set's problems have so many right answers of four; the greedy one is right where most are."""
    sets = {}
    for name, counts in correct.items():
        rows = [{"id": f"{name}/{i}", "n": 4, "correct": c, "score": c / 4, "greedy": float(c > 2)} for i, c in enumerate(counts)]
        sets[name] = {"settings": SETTINGS | settings, "fingerprint": name, "by_problem": rows, "problems": len(rows)}
    return {"label": "model", "seed": 1, "sets": sets}


def write(folder: Path, name: str, content: dict) -> Path:
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    file = folder / "evaluations" / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


A = {"easy": [4, 4, 0, 2], "hard": [0, 0, 1, 0, 0, 3]}
B = {"easy": [4, 3, 1, 2], "hard": [4, 0, 0, 0, 2, 4]}


def test_side_by_side(tmp_path):
    found = compare(write(tmp_path / "a", "m", summary(A)), write(tmp_path / "b", "m", summary(B)))
    rows = {(one.set, one.kind): one for one in found.differences}
    assert set(rows) == {(name, kind) for kind in ("avg@4", "greedy") for name in ("easy", "hard")} | {
        ("mean of 2 sets", "avg@k"), ("mean of 2 sets", "greedy"),
    }  # fmt: skip
    easy, mean = rows["easy", "avg@4"], rows["mean of 2 sets", "avg@k"]
    assert (easy.a, easy.b, easy.difference, easy.problems) == (10 / 16, 10 / 16, 0.0, 4)
    assert mean.a == pytest.approx((10 / 16 + 4 / 24) / 2) and mean.b == pytest.approx((10 / 16 + 10 / 24) / 2) and mean.problems == 10
    assert found.warnings == []
    assert [(one.id, one.a, one.b) for one in found.changes][:2] == [("hard/0", 0.0, 1.0), ("hard/4", 0.0, 0.5)]
    assert [one.id for one in found.only_a] == ["hard/2"] and [one.id for one in found.only_b] == ["hard/0", "hard/4", "easy/2"]
    turned = compare(tmp_path / "b", tmp_path / "a")
    assert [one.difference for one in turned.differences] == [-one.difference for one in found.differences]


def test_the_interval_is_paired():
    """Of 300 problems with large differences between problems and a small, sure gain: the closed form of the mean of differences, which an
    unpaired comparison would drown."""
    generator = numpy.random.default_rng(3)
    a = generator.integers(0, 2, 300) * 0.8
    b = a + 0.05 + 0.1 * generator.standard_normal(300)
    found = difference("s", "avg@4", [(a.tolist(), b.tolist())])
    error = (b - a).std() / 300**0.5
    assert found.interval == pytest.approx((found.difference - 1.96 * error, found.difference + 1.96 * error), abs=0.1 * error)
    assert found.p < 0.001 and a.std() / 300**0.5 * 1.96 > found.difference / 2


def test_p_is_even_where_nothing_differs():
    """Over pairs of the same kind p is spread evenly: a tenth of them is below 0.1, and not many more."""
    generator = numpy.random.default_rng(4)
    p = [difference("s", "greedy", [generator.integers(0, 2, (2, 30)).astype(float).tolist()]).p for _ in range(24)]
    assert sum(one < 0.1 for one in p) <= 7 and sum(one < 0.5 for one in p) >= 5 and max(p) > 0.8
    assert difference("s", "greedy", [([0.0, 1.0], [0.0, 1.0])]).p == 1.0


def test_other_settings_are_told_and_sets_of_one_alone_left_out(tmp_path):
    a, b = write(tmp_path / "a", "m", summary(A)), write(tmp_path / "b", "m", summary({"easy": B["easy"]}, temperature=0.6) | {"seed": 2})
    found = compare(a, b)
    assert found.warnings == [
        "warning: hard is in A only",
        "warning: seeds differ: 1 and 2",
        "warning: temperature of easy differs: 1.0 and 0.6",
    ]
    assert {one.set for one in found.differences} == {"easy"}


def test_what_is_refused(tmp_path):
    a = write(tmp_path / "a", "m", summary(A))
    for other, said in (
        (summary({"easy": [1, 2, 3]}), "different problems in easy .1 are in one only, e.g. easy/3"),
        (summary({"other": [1]}), "no set in common"),
        ({"sets": 3}, "holds no results"),
        ({"label": "m", "sets": {}}, "holds no results"),
        ({"label": "m", "sets": {"a": {"fingerprint": "f", "by_problem": [{"id": "a/0"}]}}}, "holds no results"),
        ({"label": "m", "sets": {"a": {"settings": SETTINGS, "fingerprint": "f", "by_problem": [{}]}}}, "holds no results"),
    ):
        with pytest.raises(UserError, match=said):
            compare(a, write(tmp_path / "b", "m", other))
    changed = summary(A)
    changed["sets"]["easy"]["fingerprint"] = "other golds"
    with pytest.raises(UserError, match="questions, golds or their order differ"):
        compare(a, write(tmp_path / "b", "m", changed))
    write(tmp_path / "a", "n", summary(A))
    write(tmp_path / "a", "step_0", summary(A))  # a training's own validation is no candidate beside others
    with pytest.raises(UserError, match="2 evaluations in .*a: give --name, one of m, n"):
        compare(tmp_path / "a", a)
    with pytest.raises(UserError, match="no evaluation o in .*use one of m, n, step_0"):
        compare(tmp_path / "a", a, "o")
    with pytest.raises(UserError, match="no evaluation at"):
        compare(tmp_path / "nowhere", a)
    assert compare(tmp_path / "a", a, "m").changes == []


@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]])
def test_the_command(form, tmp_path, capsys):
    write(tmp_path / "a", "m|n", summary(A))
    write(tmp_path / "b", "m", summary(B))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *form]) == 0
    printed = capsys.readouterr().out
    if form == ["--json"]:
        told = json.loads(printed)
        assert len(told["differences"]) == 6 and len(told["only_b"]) == 3 and told["differences"][0]["difference"] == 0.0
    else:
        assert "problems only B solves: 3" in printed and "hard/0" in printed and "+25.0 [" in printed
    if form == ["--markdown"]:
        assert printed.count("| --- |") >= 4
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2

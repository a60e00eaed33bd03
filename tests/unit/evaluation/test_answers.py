"""What is kept of an evaluation: what may go on and what may not, damage, and results that are set aside."""

import errno
import json
import logging

import pytest

from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation.answers import Answers
from megatron_nft.evaluation.files import free_names, in_work, swap
from megatron_nft.trajectories import Prompt, Response, Verdict

SETTINGS = {
    "model": "here", "weights": "abc", "seed": 1, "precision": "fp32",
    "sets": {"a": {"k": 2, "temperature": 1.0, "fingerprint": "f"}, "b": {"k": 1, "temperature": 0.6, "fingerprint": "g"}},
}  # fmt: skip
WANTED = {("a", 0): 2, ("a", 1): 2}


def changed(**more) -> dict:
    return {**SETTINGS, **more}


def response(text: str = "x") -> Response:
    return Response([1, 2], [-0.5, -0.5], "stop", 0, text, verdict=Verdict(1.0, "right", "7"))


def fill(directory, position: int, number: int = 2, engine: int = 0) -> None:
    answers = Answers(directory, engine=engine)
    answers.add(("a", position), Prompt(f"a/{position}", "q?", "7", (), "a", ("8",)), {"sampled": [response() for _ in range(number)]})
    answers.flush()


def test_the_same_settings_go_on(tmp_path):
    directory = tmp_path / "m.answers"
    kept.begin(directory, SETTINGS, WANTED, True)
    kept.begin(directory, changed(model="moved"), WANTED, True)
    only = changed(sets={"b": SETTINGS["sets"]["b"], "c": {"k": 9}})  # a set less and one more
    kept.begin(directory, only, WANTED, True)
    assert kept.read_settings(directory)["sets"].keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (changed(seed=2), "seed was 1, and is 2"),
        (changed(weights="xyz"), "weights was abc, and is xyz"),
        (changed(sets={"a": {"k": 2, "temperature": 0.6, "fingerprint": "f"}}), "temperature of a was 1.0, and is 0.6"),
        (changed(sets={"a": {"k": 2, "temperature": 1.0, "fingerprint": "h"}}), "fingerprint of a was f, and is h"),
    ],
)
def test_others_are_refused_or_begin_anew(now, said, tmp_path):
    directory = tmp_path / "m.answers"
    kept.begin(directory, SETTINGS, WANTED, True)
    fill(directory, 0)
    with pytest.raises(UserError, match=said) as caught:
        kept.begin(directory, now, WANTED, True)
    assert "resume=false" in str(caught.value) and kept.known(directory, WANTED).done == {("a", 0)}
    kept.begin(directory, now, WANTED, False)
    assert not kept.files(directory) and kept.read_settings(directory) == now
    assert kept.known(tmp_path / "m.answers.1", WANTED).done == {("a", 0)}  # nothing is lost


def test_damaged_settings_are_one_line(tmp_path):
    kept.begin(tmp_path, SETTINGS, WANTED, True)
    for damaged in ('{"seed": ', "{}", "[1]", '{"sets": {"a": 1}}'):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match="settings.json is damaged"):
            kept.begin(tmp_path, SETTINGS, WANTED, True)
    with pytest.raises(UserError, match="no answers at"):
        kept.read_settings(tmp_path / "nowhere")


def test_engines_write_files_of_their_own_and_a_problem_counts_once(tmp_path):
    fill(tmp_path, 0, engine=0)
    fill(tmp_path, 0, engine=1)  # the same problem again
    fill(tmp_path, 1, number=1)  # not all of its answers
    assert [file.name for file in kept.files(tmp_path)] == ["part-0-00000.parquet", "part-0-00001.parquet", "part-1-00000.parquet"]
    answers = kept.known(tmp_path, WANTED)
    assert answers.done == {("a", 0)} and [(one.position, one.scores) for one in answers.told] == [(0, (1.0, 1.0))]


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_passed_over(damage, tmp_path, caplog):
    fill(tmp_path, 0)
    fill(tmp_path, 1)
    file = kept.files(tmp_path)[0]
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-20], "empty": b"", "other": b"PAR1" + b"x" * 60 + b"PAR1"}[damage])
    with caplog.at_level(logging.WARNING):
        assert kept.known(tmp_path, WANTED).done == {("a", 1)} and kept.files(tmp_path)[0] == file  # who only reads changes nothing
        assert kept.begin(tmp_path, SETTINGS, WANTED, True).done == {("a", 1)}
    assert "part-0-00000.parquet, which is damaged" in caplog.text
    fill(tmp_path, 0)
    caplog.clear()
    assert kept.known(tmp_path, WANTED).done == {("a", 0), ("a", 1)} and not caplog.text  # told once
    assert {file.name for file in tmp_path.iterdir()} >= {"part-0-00000.parquet.damaged", "part-0-00002.parquet"}


def test_a_passing_fault_of_the_system_costs_no_answers(tmp_path, monkeypatch):
    fill(tmp_path, 0)
    with monkeypatch.context() as patched:

        def read(*_):
            raise OSError(errno.EIO, "Input/output error")

        patched.setattr(kept, "read", read)
        with pytest.raises(UserError, match="part-0-00000.parquet cannot be read .Input/output error.: try again"):
            kept.begin(tmp_path, SETTINGS, WANTED, True)
    assert kept.begin(tmp_path, SETTINGS, WANTED, True).done == {("a", 0)}


def test_beginning_anew_moves_the_results_aside_too(tmp_path):
    directory = tmp_path / "a.b.answers"
    fill(directory, 0)
    for name in ("a.b.json", "a.b.md", "a.b.json.1", "a.json"):
        (tmp_path / name).write_text(name)
    assert kept.begin(directory, SETTINGS, WANTED, False).done == set()
    assert {path.name for path in tmp_path.iterdir()} == {"a.b.answers", "a.b.answers.2", "a.b.json.2", "a.b.md.2", "a.b.json.1", "a.json"}
    assert (tmp_path / "a.b.json.2").read_text() == "a.b.json"


def test_one_holds_it_and_clears_up_after_one_that_was_killed(tmp_path):
    directory = tmp_path / "m.answers"
    fill(directory, 0)
    in_work(directory).mkdir()
    with kept.held(directory):
        assert not in_work(directory).exists()
        with pytest.raises(UserError, match="m.answers is being written by another"), kept.held(directory):
            pass
    fill(in_work(directory), 1)
    directory.rename(tmp_path / ".m.answers.old")  # as far as a swap came
    with kept.held(directory):
        assert kept.known(directory, WANTED).done == {("a", 0)}
    fill(in_work(directory), 1)
    swap(directory)
    assert kept.known(directory, WANTED).done == {("a", 1)}
    assert {path.name for path in tmp_path.iterdir()} == {"m.answers", ".m.lock"}


def test_what_is_read_is_what_was_written(tmp_path):
    fill(tmp_path, 0)
    row = kept.read(kept.files(tmp_path)[0])[1]
    assert kept.prompt_of(row) == Prompt("a/0", "q?", "7", (), "a", ("8",))
    assert (row["sample"], row["tokens"], row["verdict"], row["outcome"], row["found"]) == (1, [1, 2], 1.0, "right", "7")


def test_free_names(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({}))
    (tmp_path / "m.json.1").write_text("")
    assert free_names(tmp_path / "m.json", tmp_path / "m.md") == [tmp_path / "m.json.2", tmp_path / "m.md.2"]

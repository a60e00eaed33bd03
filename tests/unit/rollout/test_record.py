"""The record of a step: what is read is what was written, to the last bit; a file is complete or not there."""

import os

import numpy as np
import pyarrow.parquet
import pytest

from megatron_nft.rollout import read_coefficients, read_rollouts, rollout_path, write_coefficients, write_rollouts
from megatron_nft.trajectories import Group, Prompt, Pushes, Response, Verdict
from tests.support import made_up_groups


def rounded(group: Group) -> Group:
    """The log-probs as vLLM gives them: float32 numbers."""
    for response in group.responses:
        response.logprobs = np.float32(response.logprobs).tolist()
    return group


def awkward_groups() -> list[Group]:
    prompt = Prompt("süß/0", "What is\n\"1+1\"? 'π'", "2", (151_642, 0, 7), "süß")
    tiny, huge = float(np.float32(1.1754944e-38)), float(np.float32(-103.27893))
    responses = [
        Response([1, 151_935], [-0.0, tiny], "stop", 3, "\x00 ½ 🙂", [1, 0], Verdict(1.0, "right"), 0.0),
        Response([2], [huge], "length", 3, "", None, Verdict(0.1, "wrong"), -0.3),
        Response([3], [float("-inf")], "stop", 4, "{}", [0], None, 1 / 3),
        Response([], [], "length", 0, "none", [], Verdict(0.0, "timed_out")),
        Response([4, 5, 6, 7], [-0.5, 0.0, -0.25, -1.0], "unfinished", 2, "4,5", [1, 0, 1, 1], None, 0.0, [(2, 3), (3, 5)]),
    ]
    return [Group(prompt, responses, position=2**40), Group(Prompt("", "", "", (), ""), responses[:1])]


@pytest.mark.parametrize("groups", [awkward_groups(), [*map(rounded, made_up_groups())], []], ids=["awkward", "made up", "none"])
def test_reads_what_was_written(groups, tmp_path):
    path = tmp_path / "new" / "step_7.parquet"
    write_rollouts(path, 7, groups)
    assert read_rollouts(path) == groups
    assert repr(read_rollouts(path)) == repr(groups)  # == takes -0.0 for 0.0, and 1 for 1.0


def test_a_prompt_may_come_twice_in_a_step(tmp_path):
    first, second = map(rounded, made_up_groups(prompts=2, n=3))
    groups = [first, Group(first.prompt, second.responses, position=1), Group(first.prompt, first.responses[:1], position=5)]
    write_rollouts(tmp_path / "step_1.parquet", 1, groups)
    assert read_rollouts(tmp_path / "step_1.parquet") == groups


def test_columns_say_what_a_reader_of_the_file_asks_for(tmp_path):
    groups = made_up_groups(prompts=2, n=2)
    write_rollouts(tmp_path / "step_3.parquet", 3, groups)
    rows = pyarrow.parquet.read_table(tmp_path / "step_3.parquet").to_pylist()
    assert [(row["step"], row["position"], row["prompt_id"], row["sample"]) for row in rows] == [
        (3, 0, "0", 0), (3, 0, "0", 1), (3, 1, "1", 0), (3, 1, "1", 1),
    ]  # fmt: skip
    assert [row["verdict"] for row in rows] == [r.verdict.score for g in groups for r in g.responses]


def test_a_second_write_replaces_the_first(tmp_path):
    path = tmp_path / "step_1.parquet"
    for groups in (made_up_groups(4), [rounded(g) for g in made_up_groups(1)]):
        write_rollouts(path, 1, groups)
    assert read_rollouts(path) == groups and [p.name for p in tmp_path.iterdir()] == ["step_1.parquet"]


@pytest.mark.parametrize("fault", ["while writing", "before the rename"])
def test_a_write_that_fails_leaves_the_old_file(fault, tmp_path, monkeypatch):
    path, old = tmp_path / "step_1.parquet", [rounded(g) for g in made_up_groups(1)]
    write_rollouts(path, 1, old)

    def fail(*arguments):
        if fault == "while writing":
            arguments[1].write_bytes(b"PAR1 half a file")
        raise OSError("disk full")

    where, name = (pyarrow.parquet, "write_table") if fault == "while writing" else (os, "replace")
    monkeypatch.setattr(where, name, fail)
    with pytest.raises(OSError, match="disk full"):
        write_rollouts(path, 1, made_up_groups(4))
    assert read_rollouts(path) == old


def test_each_engine_has_its_own_file(tmp_path):
    assert rollout_path(tmp_path, 3) == tmp_path / "rollouts" / "step_3.parquet"
    paths = [rollout_path(tmp_path, 3, engine, 2) for engine in range(2)]
    assert [path.name for path in paths] == ["step_3-0.parquet", "step_3-1.parquet"]


def test_a_file_that_is_older_than_a_column_is_read(tmp_path):
    path, groups = tmp_path / "step_1.parquet", [rounded(group) for group in made_up_groups(2)]
    write_rollouts(path, 1, groups)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["later_versions"]), path)
    assert read_rollouts(path) == groups


def test_coefficients(tmp_path):
    """To the last bit of float32; a token that is not trained on has none."""
    pushes = [Pushes(2**40, 3, [1.0, None, 0.5], [-0.25, None, 0.0]), Pushes(0, 0, [], [])]
    write_coefficients(tmp_path, 4, pushes)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["coefficients_4.parquet"]
    assert read_coefficients(tmp_path, 4) == pushes and read_coefficients(tmp_path, 5) == []

"""SIGTERM and SIGUSR1: exit code 75, one line, the state saved; and the run that goes on ends as one that was never stopped."""

import json
import os

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL, run

TWO_RANKS = [*SMALL, "train.steps=2", "parallel.tensor_model_parallel_size=2"]


def line(printed: str) -> str:
    """The newest line of the program's own about the stop."""
    found = [text for text in printed.splitlines() if text.startswith("megatron-nft: ")]
    assert found, printed
    return found[-1]


def test_stopped_at_any_time_and_resumed_equals_never_stopped(small, tmp_path):
    """In generation; in training, and asked again and again while the step is finished and saved; in the validation of a step."""
    run_dir, log = tmp_path / "run", tmp_path / "log"

    def stopped(**at) -> str:
        printed = run("train", run_dir, *SMALL, log=log, at=at, code=75)
        assert "Traceback" not in printed
        return line(printed)

    saved = "megatron-nft: stopped on request after step {}, saved; the same command goes on"
    assert stopped(stage="generate", step=2, after=0.0, signal="SIGUSR1") == saved.format(1)
    assert [row["step"] for row in runs.rows(run_dir)] == [0, 1]
    assert stopped(stage="train", step=2, after=0.1, signal="SIGTERM", times=60) == saved.format(2)
    assert stopped(stage="validate", step=4, after=0.0, signal="SIGUSR1") == saved.format(4)
    assert [row["step"] for row in runs.rows(run_dir)] == [0, 1, 2, 3]  # the row of step 4 waits for its validation
    run("train", run_dir, *SMALL, log=log)
    runs.assert_same_run(run_dir, small, 5)


@pytest.mark.skipif(os.environ.get("MEGATRON_NFT_LONG") != "1", reason="make test-long")
def test_stopped_before_the_first_step(tmp_path):
    printed = run("train", tmp_path / "run", *SMALL, log=tmp_path / "log", code=75,
                  at={"stage": "validate", "step": 1, "after": 0.0, "signal": "SIGTERM"})  # fmt: skip
    assert line(printed) == "megatron-nft: stopped on request before the first step was finished; the same command begins again"
    assert runs.saved_step(tmp_path / "run") == 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two ranks, two engines, one TP2 model; undisturbed."""
    folder = tmp_path_factory.mktemp("straight")
    run("train", folder / "run", *TWO_RANKS, log=folder / "log", ranks=2)
    return folder / "run"


def test_one_rank_of_two_is_asked(straight, tmp_path):
    """Rank 1 alone gets the signal, while answers are sampled; both stop at the same scheduler step. torchrun itself exits with 1."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    at = {"stage": "generate", "step": 2, "after": 0.0, "signal": "SIGUSR1", "ranks": [1]}
    printed = run("train", run_dir, *TWO_RANKS, log=log, ranks=2, at=at, code=1)
    assert line(printed) == "megatron-nft: stopped on request after step 1, saved; the same command goes on"
    assert printed.count("stopped on request") == 1 and "exitcode  : 75" in printed
    assert runs.survivors(run_dir) == []
    run("train", run_dir, *TWO_RANKS, log=log, ranks=2)
    runs.assert_same_run(run_dir, straight, 2)


def test_sft_stops_and_goes_on(tmp_path):
    """The update under way is finished and saved."""
    data = tmp_path / "worked.jsonl"
    row = {"problem": "What is 2*3+4?", "solution": "2*3=6\n6+4=10\n\\boxed{10}", "answer": "10"}
    data.write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(40)))
    settings = [f"model.path={runs.DEMO / 'model'}", f"sft.data.0.path={data}", "sft.steps=6", "sft.sequences_per_update=16",
                "train.tokens_per_micro_batch=512"]  # fmt: skip
    more = {"log": tmp_path / "log", "config": runs.DEMO / "sft.yaml"}
    run("sft", tmp_path / "whole", *settings, **more)
    at = {"stage": "train", "step": 3, "after": 0.0, "signal": "SIGTERM"}
    printed = run("sft", tmp_path / "parts", *settings, **more, at=at, code=75)
    assert line(printed) == "megatron-nft: stopped on request after step 3, saved; the same command goes on"
    run("sft", tmp_path / "parts", *settings, **more)
    runs.assert_same_run(tmp_path / "parts", tmp_path / "whole", 6)

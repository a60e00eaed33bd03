"""`megatron-nft evaluate` on a fake engine: what is compared before it goes on, what a stop says, who judges."""

import threading
import time
from pathlib import Path

import pytest

from megatron_nft import cli
from megatron_nft.config import Config, DatasetConfig, EvaluationConfig, EvaluationSetConfig, RolloutConfig
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation import command
from megatron_nft.evaluation.answers import Answers, Known
from megatron_nft.evaluation.source import Source
from megatron_nft.prompts import PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.stopping import Stopped, StopRequest
from tests.support import ROOT
from tests.unit.rollout.fakes import CHANCE, MIXED, RIGHT, FakeEngine, Lockstep, fake_prompt, on_ranks

MODEL = ROOT / "examples/arithmetic/model"
SOURCE = Source(MODEL, MODEL, "m")
SETS = {"data": PromptSet([fake_prompt(kind, i) for i, kind in enumerate([RIGHT, RIGHT, MIXED, CHANCE, CHANCE])])}


class Engine(FakeEngine):
    """Which is asked to stop after so many steps, on all ranks."""

    stop_after = 99

    def step(self, alone=False):
        if self.steps == self.stop_after:
            raise Stopped("asked")
        return super().step(alone)

    def scale_cache_by(self, prompts) -> None:
        """An engine without an FP8 cache."""

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    config = Config(run_dir=str(tmp_path), rollout=RolloutConfig(max_tokens=16),
                    evaluation=EvaluationConfig(k=2, sets=[EvaluationSetConfig("data.jsonl")]))  # fmt: skip
    config.model.path = str(MODEL)
    monkeypatch.setattr(command, "load_sets", lambda *_: SETS)
    monkeypatch.setattr(command, "Engine", lambda *_: Engine(3))
    return config


def code(folder: Path, name: str, text: str = "def f(response, answer):\n    return 1.0\n") -> str:
    (folder / name).write_text(text)
    return f"{folder / name}:f"


def test_a_command_that_is_given_again_answers_nothing_again(config, capsys, monkeypatch):
    config.data.train = [DatasetConfig(path="t.jsonl", reward="nowhere.py:f")]  # which evaluation has no use for
    command.evaluate_model(config, SOURCE, "fp32")
    first = capsys.readouterr().out
    monkeypatch.delattr(command, "Engine")
    command.evaluate_model(config, SOURCE, "fp32")
    again = capsys.readouterr().out
    assert "5 of 5 problems are answered" in again and first[first.index("set ") :] == again[again.index("set ") :]


CHANGES = {
    "quantization": lambda config: setattr(config.rollout, "quantization", "fp8"),
    "kv_cache_dtype": lambda config: setattr(config.rollout, "kv_cache_dtype", "fp8"),
    "calculate_kv_scales": lambda config: setattr(config.rollout, "calculate_kv_scales", False),
    "speculative_config": lambda config: config.rollout.speculative_config.update(method="ngram"),
    "vllm": lambda config: config.rollout.vllm.update(hf_overrides={"rope_theta": 1}),
    "time_limit of data": lambda config: setattr(config.reward, "time_limit", 9),
    "memory_limit of data": lambda config: setattr(config.reward, "memory_limit", 9),
    "reward_code of data": lambda config: code(Path(config.run_dir), "verdict.py", "def f(response, answer):\n    return 0.0\n"),
    "function_code": lambda config: code(Path(config.run_dir), "tool.py", "def f(prompt, answer):\n    yield '='\n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_about_answers_and_verdicts_is_compared(what, config, tmp_path):
    config.reward.function, config.rollout.function = code(tmp_path, "verdict.py"), code(tmp_path, "tool.py")
    before = command.settings_of(SETS, config, SOURCE, "fp32", 99)
    assert kept.differences(before, command.settings_of(SETS, config, SOURCE, "fp32", 100)) == []  # room enough in both windows
    CHANGES[what](config)
    [said] = kept.differences(before, command.settings_of(SETS, config, SOURCE, "fp32", 99))
    assert said.startswith(f"{what} was ")


def test_a_window_that_leaves_less_room_is_another_setting(config):
    before = command.settings_of(SETS, config, SOURCE, "fp32", 99)
    assert kept.differences(before, command.settings_of(SETS, config, SOURCE, "fp32", 10)) == ["least_room of data was 16, and is 8"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_stop_counts_what_every_engine_wrote_and_says_how_to_go_on(resume, config, tmp_path, monkeypatch, capsys):
    """After three steps of the slowest writer's, too: the problems of two and three tokens are answered."""
    flush, known, own = Answers.flush, Known(), threading.local()
    monkeypatch.setattr(Engine, "stop_after", 3)
    monkeypatch.setattr(Answers, "flush", lambda answers: (time.sleep(0.2 * answers._engine), flush(answers)))
    monkeypatch.setattr(command, "Engine", lambda *_: own.engine)
    stop = StopRequest(9, cli.goes_on(resume))

    def answer(engine: FakeEngine) -> str:
        own.engine = Engine(3, engine._rank, 1, engine._lockstep)
        with pytest.raises(Stopped) as stopped:
            command._answer(config, SOURCE, "fp32", SETS, tmp_path, known, 99, stop)
        return str(stopped.value)

    expected = "stopped on request with 3 of 5 problems answered; " + ("" if resume else "with resume=true ") + "the same command goes on"
    assert [said.startswith(expected) for said in on_ranks(2, 3, answer)] == [True, True]


def test_interrupted_by_the_keyboard(config, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_evaluate_model", interrupt)
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path}\nmodel: {{path: {MODEL}}}\nevaluation: {{sets: [{{path: data.jsonl}}]}}\n")
    for setting, said in (("resume=true", "interrupted; the same"), ("resume=false", "interrupted; with resume=true the same")):
        assert cli.main(["evaluate", str(tmp_path / "c.yaml"), setting]) == 130
        assert f"{said} command goes on after the problems that are answered" in capsys.readouterr().err


def test_a_rank_that_hands_on_no_answers_has_neither_judge_nor_bar(config, tmp_path, monkeypatch, capsys):
    given = {}
    config.rollout.tensor_parallel_size = 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Judge, "for_config", lambda *_: pytest.fail("a judge is started"))
    monkeypatch.setattr(command, "Engine", lambda *_: Engine(3, 1, 2, Lockstep(2)))
    monkeypatch.setattr(command, "evaluate", lambda engine, judge, *more: given.update(judge=judge, on_finish=more[3]))
    command._answer(config, SOURCE, "fp32", SETS, tmp_path, Known(), 99, None)
    given["on_finish"](0, None)
    assert given["judge"] is None and capsys.readouterr().out == ""


def test_who_is_refused_is_told_so_before_anything_is_done(config):
    directory = kept.directory_of(config.run_dir, "m")
    directory.parent.mkdir()
    with kept.held(directory), pytest.raises(UserError, match="is being written by another evaluation"):
        command.evaluate_model(config, SOURCE, "fp32")
    assert not directory.exists()

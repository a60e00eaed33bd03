"""New verdicts for saved answers: results as if they had been judged so at once; and how results are shown."""

import json
from pathlib import Path

import pytest

from megatron_nft import report
from megatron_nft.cli import main
from megatron_nft.config import Config, EvaluationConfig, EvaluationSetConfig, RolloutConfig
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation import tables
from megatron_nft.evaluation.answers import Answers
from megatron_nft.evaluation.command import publish, settings_of, window_of
from megatron_nft.evaluation.evaluate import evaluate
from megatron_nft.evaluation.files import in_work
from megatron_nft.evaluation.problems import all_problems
from megatron_nft.evaluation.rejudge import rejudge
from megatron_nft.evaluation.source import Source
from megatron_nft.prompts import PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.trajectories import Prompt, Response, Verdict
from tests.support import ROOT
from tests.unit.rollout.fakes import CHANCE, RIGHT, FakeEngine, fake_prompt

MODEL = ROOT / "examples/arithmetic/model"
SETS = {"data": PromptSet([fake_prompt(CHANCE, i) for i in range(6)]), "more": PromptSet([fake_prompt(RIGHT, 9)], {"empty": 2})}
TURNED = "def turned(response, answer):\n    return float(answer not in response)\n"


def config_of(run_dir: Path) -> Config:
    sets = [EvaluationSetConfig("data.jsonl", temperature=0.6), EvaluationSetConfig("more.jsonl")]
    config = Config(run_dir=str(run_dir), rollout=RolloutConfig(max_tokens=16), evaluation=EvaluationConfig(k=2, sets=sets))
    config.model.path = str(MODEL)
    return config


def evaluated(run_dir: Path, name: str = "m") -> dict:
    """As `megatron-nft evaluate` does it, but for the engine."""
    config, directory = config_of(run_dir), kept.directory_of(run_dir, name)
    wanted = {problem.key: problem.sampling.answers for problem in all_problems(SETS, config)}
    known = kept.begin(directory, settings_of(SETS, config, Source(MODEL, MODEL, name), "fp32", 99), wanted, True)
    with Judge({}, "strict_box", 1, 1) as judge:
        summary = evaluate(FakeEngine(3), judge, SETS, config, str(MODEL), answers=Answers(directory, known)).summary
    publish(run_dir, name, summary)
    return summary


def saved(run_dir: Path, name: str = "m.json") -> dict:
    return json.loads((run_dir / "evaluations" / name).read_text())


def without_intervals(result: dict) -> dict:
    return {key: value for key, value in result.items() if not key.endswith("_interval")}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    evaluated(tmp_path)
    (tmp_path / "turned.py").write_text(TURNED)
    return tmp_path


def test_the_same_function_gives_the_same_results(run_dir):
    before = saved(run_dir)
    printed = rejudge(config_of(run_dir))
    assert printed.startswith("0 of 21 verdicts changed; the old results are in") and saved(run_dir) == before == saved(run_dir, "m.json.1")


def test_another_function_changes_what_it_changes(run_dir):
    before, config = saved(run_dir), config_of(run_dir)
    config.evaluation.sets[0].reward = f"{run_dir / 'turned.py'}:turned"
    assert rejudge(config, "m").startswith("18 of 21 verdicts changed")
    after = saved(run_dir)
    assert after["sets"]["more"] == before["sets"]["more"]
    assert after["sets"]["data"]["avg@2"] == pytest.approx(1 - before["sets"]["data"]["avg@2"])
    assert after["sets"]["data"]["greedy"] == pytest.approx(1 - before["sets"]["data"]["greedy"])
    assert after["sets"]["data"]["settings"]["reward"].endswith(":turned")
    assert kept.read_settings(run_dir / "evaluations/m.answers")["sets"]["data"]["reward"].endswith(":turned")
    assert saved(run_dir, "m.json.1") == before and rejudge(config).startswith("0 of 21")


def test_what_cannot_be_judged_again(run_dir, tmp_path):
    with pytest.raises(UserError, match="no answers at .*n.answers"):
        rejudge(config_of(run_dir), "n")
    evaluated(run_dir, "other")
    config = config_of(run_dir)
    config.model.path = "nowhere"
    with pytest.raises(UserError, match="is not clear: give --rejudge one of m, other"):
        rejudge(config)
    before = saved(run_dir)
    (run_dir / "broken.py").write_text("def broken(response, answer):\n    return 7\n")
    config.evaluation.sets[0].reward = f"{run_dir / 'broken.py'}:broken"
    with pytest.raises(UserError, match="broken' returned '7'"):
        rejudge(config, "m")
    assert not in_work(run_dir / "evaluations/m.answers").exists() and saved(run_dir) == before
    kept.files(run_dir / "evaluations/m.answers")[0].unlink()
    with pytest.raises(UserError, match="lacks the answers to 7 problems"):
        rejudge(config, "m")
    assert saved(run_dir) == before


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_nobody_else_is_at_it_and_a_kill_changes_nothing(run_dir, monkeypatch):
    directory, config = kept.directory_of(run_dir, "m"), config_of(run_dir)
    config.evaluation.sets[0].reward = "dapo"
    (directory / "part-7-00000.parquet.damaged").write_text("of an earlier start")
    before = content(directory)
    with kept.held(directory), pytest.raises(UserError, match="is being written by another"):
        rejudge(config, "m")
    with monkeypatch.context() as patched:
        patched.setattr("megatron_nft.evaluation.rejudge.swap", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # when all verdicts are there
            rejudge(config, "m")
    assert content(directory) == before and not in_work(directory).exists()
    assert rejudge(config, "m").startswith("18 of 21")  # no answer line: every verdict is another
    assert content(directory).keys() == before.keys() and content(directory) != before


def test_sets_that_were_never_finished_are_left_as_they_are(run_dir):
    directory = kept.directory_of(run_dir, "m")
    settings = kept.read_settings(directory)
    settings["sets"]["late"] = settings["sets"]["more"] | {"problems": 2}
    (directory / "settings.json").write_text(json.dumps(settings))
    answers = Answers(directory)
    one = Response([1], [-0.5], "stop", 0, "\\boxed{1}", verdict=Verdict(0.0, "wrong"))
    answers.add(("late", 1), Prompt("late/1", "1?", "1", (), "late"), {"greedy": [one], "sampled": [one, one]})
    answers.flush()
    before = saved(run_dir)
    printed = rejudge(config_of(run_dir))
    assert printed.startswith("0 of 21 verdicts changed; ") and "late is not finished (it lacks 1 problems)" in printed
    assert saved(run_dir)["sets"] == before["sets"]
    rows = [row for file in kept.files(directory) for row in kept.read(file) if row["set"] == "late"]
    assert [row["outcome"] for row in rows] == ["wrong"] * 3


def test_the_settings_follow_the_verdicts(run_dir):
    config = config_of(run_dir)
    config.reward.time_limit, config.evaluation.sets[0].reward = 9, "dapo"
    rejudge(config, "m")
    settings = settings_of(SETS, config, Source(MODEL, MODEL, "m"), "fp32", 99)
    assert kept.differences(kept.read_settings(kept.directory_of(run_dir, "m")), settings) == []


def test_the_command(run_dir, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"problem": "1?", "answer": "1"}) + "\n")
    (tmp_path / "c.yaml").write_text(f"run_dir: {run_dir}\nmodel: {{path: {MODEL}}}\nevaluation: {{sets: [{{path: {data}}}]}}\n")
    for words in (["--rejudge"], ["--rejudge", "m"], ["--rejudge", "seed=2"], ["seed=2", "--rejudge", "m", "evaluation.k=3"]):
        assert main(["evaluate", str(tmp_path / "c.yaml"), *words]) == 0
        assert capsys.readouterr().out.startswith("0 of 21 verdicts changed")


def test_temperature_and_k_stand_beside_every_number(run_dir):
    lines = tables.plain(saved(run_dir)).split("\n")
    assert lines[0].split() == ["set", "problems", "k", "T", "top_p", "greedy", "(T", "0)", "avg@k", "pass@k", *_maj(run_dir), "tokens",
                                "cut", "off", "no", "answer"]  # fmt: skip
    assert lines[1].split()[:5] == ["data", "6", "2", "0.6", "1"]
    assert lines[2].split()[:7] == ["more", "1", "(dropped:", "2)", "2", "1", "1"]
    assert lines[3].split()[:9] == ["mean", "of", "2", "sets", "7", "2", "0.6,", "1", "1"]
    text = (run_dir / "evaluations" / "m.md").read_text()
    assert text.count("| data | 0.6 | 1 |") == 1 and "| data | strict_box | 16 |" in text and "95 % intervals" in text


def _maj(run_dir: Path) -> list[str]:
    return ["maj@k"] if "maj@2" in saved(run_dir)["sets"]["data"] else []


def test_the_report_of_a_directory_with_evaluations_alone(run_dir):
    text = report.write_report(run_dir).read_text()
    assert "Evaluation m" in text and "rollout steps" not in text and "Curves" not in text and text.count("<td>0.6</td>") == 2
    assert text.count("<article") >= 3 and "\\boxed{1}" in text
    summary = report.summary(run_dir)
    assert summary.startswith("m\nset ") and summary.endswith(f"report: {run_dir / 'report.html'}")
    (run_dir / "evaluations" / "notes.json").write_text("[]")  # no results: passed over
    assert report.summary(run_dir) == summary


def test_answers_that_cannot_be_read_cost_no_report(run_dir, monkeypatch):
    """Half a file, and one that the system refuses; what can be read is read once, for the page."""
    directory = kept.directory_of(run_dir, "m")
    (directory / "part-0-00001.parquet").write_bytes(kept.files(directory)[0].read_bytes()[:-9])
    (directory / "part-0-00002.parquet").symlink_to(directory / "nowhere")
    files, read = [], kept.read
    monkeypatch.setattr(kept, "read", lambda file, columns: files.append(file.name) or read(file, columns))
    kept.files(directory)[0].rename(directory / "part-1-00000.parquet")
    text = report.write_report(run_dir).read_text()
    report.summary(run_dir)
    assert "\\boxed{1}" in text and files == ["part-0-00001.parquet", "part-0-00002.parquet", "part-1-00000.parquet"]


@pytest.mark.parametrize("metrics", ["", '{"step": 0, "ti'])
def test_a_training_without_a_step_costs_no_report(metrics, run_dir):
    (run_dir / "metrics.jsonl").write_text(metrics)
    assert "Evaluation m" in report.write_report(run_dir).read_text() and report.summary(run_dir).startswith("m\nset ")


def test_a_broken_training_costs_no_table(run_dir):
    (run_dir / "metrics.jsonl").write_text('{"step": \n{"step": 1}\n')
    printed = publish(run_dir, "m", saved(run_dir))
    assert printed.startswith("set ") and "no page: line 1 of" in printed and printed.endswith("is not JSON: remove that line")


def test_no_problem_is_too_long_for_the_window(tmp_path, caplog):
    """The window grows with the longest problem up to the model's own; what does not leave a token of room is refused."""
    config = config_of(tmp_path)
    config.data.max_prompt_length = 8
    own = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]

    def window(length: int) -> int:
        return window_of({"data": PromptSet([Prompt("a", "q", "1", tuple([1] * length), "data")])}, config)

    assert window(5) == 8 + 16 and window(20) == 20 + 16 and not caplog.records
    assert window(own - 3) == own and "leaves 3 for its answer" in caplog.text
    with pytest.raises(UserError, match=f"has {own} tokens, and the model's window {own}"):
        window(own)

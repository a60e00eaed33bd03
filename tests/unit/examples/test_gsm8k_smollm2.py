"""examples/gsm8k_smollm2: its configs, GSM8K's solutions as the verdict wants them, and the driver that stops and goes on."""

import json
import signal
import sys
from dataclasses import asdict

import pytest

from megatron_nft.config import SetSampling, load, load_with_sources
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation.scores import Answered, set_result
from megatron_nft.trajectories import Prompt, Response, Verdict
from tests.support import REAL, ROOT, byte_tokenizer, load_example, tiny_model

HERE = ROOT / "examples" / "gsm8k_smollm2"
prepare, stages, run, outcome = (load_example(f"gsm8k_smollm2/{name}.py") for name in ("prepare", "stages", "run", "outcome"))
outcome.ARMS = stages.ARMS
reward = load_example("smollm2/reward.py")


def differing(one: dict, other: dict, where: str = "") -> set[str]:
    found = set()
    for key in one:
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found |= differing(one[key], other[key], f"{where}{key}.")
        elif one[key] != other[key]:
            found.add(where + key)
    return found


def test_the_arms_differ_in_their_objective_alone():
    nft, *others = (asdict(load(HERE / f"{arm}.yaml")) for arm in stages.ARMS)
    assert nft["train"]["sampled_tokens"] == 3_000_000 and nft["rollout"]["n"] == 16 and nft["model"]["fp8"] is None
    rft, dapo, fp8 = (differing(nft, other) for other in others)
    assert fp8 == {"run_dir", "model.fp8"}
    assert {key.partition(".")[0] for key in rft | dapo} == {"run_dir", "objective"}
    assert {other["objective"]["reduction"] for other in (nft, *others)} == {"token-mean"}


def test_the_preset_is_the_file_beside():
    config, sources = load_with_sources(HERE / "rft.yaml")
    assert sources["rollout.n"] == "preset common.yaml" and sources["objective.name"] == str(HERE / "rft.yaml")
    assert config.preset == [] and "preset" not in sources  # what is saved of it has all settings, wherever it is read again
    assert load(HERE / "evaluate.yaml").evaluation.k == 8 and load(HERE / "evaluate.yaml").evaluation.sets[0].name == "gsm8k"


def test_warm_start_and_arms_share_data_and_place():
    sft, nft = load(HERE / "sft.yaml"), load(HERE / "nft.yaml")
    assert [one.path for one in sft.sft.data] == [one.path for one in nft.data.train]
    assert nft.model.path == f"{sft.run_dir}/huggingface"
    heldout = 500
    assert sft.sft.steps == round(3 * (7473 - heldout) / sft.sft.sequences_per_update) and heldout == prepare.HELD_OUT


@pytest.mark.slow
@pytest.mark.parametrize("arm", stages.ARMS)
def test_an_arm_passes_its_dry_run(arm, tmp_path, capsys):
    from megatron_nft import trainer

    model = byte_tokenizer(tiny_model(tmp_path / "model", "llama", vocab_size=304, hidden_size=32, max_position_embeddings=600))
    rows = [{"id": str(i), "problem": f"What is {i} + 1?", "answer": str(i + 1), "solution": f"#### {i + 1}"} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"run_dir={tmp_path / 'run'}", f"model.path={model}", f"data.train.0.path={data}", f"evaluation.sets.0.path={data}",
                f"reward.function={ROOT / 'examples/smollm2/reward.py'}:last_number"]  # fmt: skip
    trainer.dry_run(load(HERE / f"{arm}.yaml", settings))
    told = capsys.readouterr().out
    assert "4 training prompts" in told and ("for a machine with GPUs: model.fp8" in told) == (arm == "nft_fp8")


# ---- data


@pytest.mark.parametrize(
    "solution, gold, text",
    [
        (
            "48/2 = <<48/2=24>>24 clips in May. \n\n48+24 = $<<48+24=72>>72.\n#### 72",
            "72",
            "48/2 = 24 clips in May.\n48+24 = $72.\n#### 72",
        ),
        ("It is <<1000*3=3000>>3,000.\n#### 3,000", "3000", "It is 3,000.\n#### 3000"),
        ("a < b and b > c\n#### -5", "-5", "a < b and b > c\n#### -5"),
        ("#### 1\n#### 2", "2", "#### 1\n#### 2"),
    ],
)
def test_a_solution_as_the_model_is_to_write_it(solution, gold, text):
    assert prepare.worked(solution, gold) == text
    assert reward.last_number(text, gold) == 1.0


def test_three_files_of_which_none_shares_a_problem(tmp_path):
    for name, count in (("gsm8k_train", 9), ("gsm8k_test", 3)):
        rows = [
            {"id": f"{name}-{i}", "problem": f"{name} {i}?", "answer": f"1,{i}00", "solution": f"So.\n#### 1,{i}00"} for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare.write(tmp_path / "out", str(tmp_path), held_out=4) == {"train": 5, "heldout": 4, "test": 3}
    made = {name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()] for name in ("train", "heldout", "test")}
    assert made["train"][2] == {"id": "gsm8k_train-2", "problem": "gsm8k_train 2?", "answer": "1200", "solution": "So.\n#### 1200"}
    assert made["heldout"][0]["id"] == "gsm8k_train-5" and made["test"][0]["problem"] == "gsm8k_test 0?"
    with pytest.raises(UserError, match="cannot be held out"):
        prepare.write(tmp_path / "out", str(tmp_path), held_out=9)
    with pytest.raises(UserError, match="no data file"):
        prepare.write(tmp_path / "out", str(tmp_path / "nothing"))


@pytest.mark.skipif(not REAL.is_dir(), reason="MEGATRON_NFT_DATA names no folder of published problems")
def test_every_solution_of_gsm8k_is_right_by_the_verdict(tmp_path):
    assert prepare.write(tmp_path, str(REAL)) == {"train": 6973, "heldout": 500, "test": 1319}
    for name in ("train", "heldout", "test"):
        for row in map(json.loads, (tmp_path / f"{name}.jsonl").open()):
            assert "<<" not in row["solution"] and row["solution"].endswith(f"#### {row['answer']}")
            assert reward.last_number(row["solution"], row["answer"]) == 1.0


# ---- the driver


def plan_for(tmp_path, **more) -> stages.Plan:
    return stages.Plan(tmp_path / "runs", model=tmp_path / "model", **more)


def test_stages_come_in_order_and_settings_go_to_the_arms_alone(tmp_path):
    made = {stage.name: stage for stage in plan_for(tmp_path, arms=("nft", "rft"), settings=("seed=7",)).stages()}
    left = [name for name in made if name not in ("unpack", "prepare")]
    assert left == ["sft", "evaluate model", "evaluate warm_start", "nft", "evaluate nft", "rft", "evaluate rft"]
    assert [name for name in left if "seed=7" in made[name].command] == ["nft", "rft"]
    assert made["evaluate nft"].needs == (tmp_path / "runs" / "nft" / "huggingface" / "config.json",)
    assert f"model.path={tmp_path / 'runs' / 'sft' / 'huggingface'}" in made["rft"].command


def test_every_command_loads(tmp_path):
    """The settings that stages give are settings that there are."""
    for stage in plan_for(tmp_path, tiny=True).stages():
        if stage.command[0] == "-m":
            _, _, command, file, *overrides = stage.command
            config = load(ROOT / file, overrides)
            assert config.run_dir.startswith(str(tmp_path / "runs")) and command in ("sft", "train", "evaluate")


STOPPABLE = """
import pathlib, signal, sys, time
mark = pathlib.Path(sys.argv[1])
if mark.exists():
    sys.exit(0)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
mark.touch()
time.sleep(600)
"""
DEAF = "import signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(600)"


def clock(left: float) -> run.Clock:
    made = run.Clock(0)
    made._end += left + run.GRACE + run.KEEPING + run.time.monotonic() - run.STARTED
    return made


def test_a_stage_is_stopped_and_goes_on(tmp_path, capsys):
    stage, record = stages.Stage("train it", ("-c", STOPPABLE, str(tmp_path / "mark"))), run.Record(tmp_path)

    class UntilMarked(run.Clock):
        left = property(lambda self: 0.0 if (tmp_path / "mark").exists() else 60.0)

    assert run.run_stage(stage, tmp_path, record, UntilMarked(9)) == 75 and not record.done(stage)
    assert run.run_stage(stage, tmp_path, run.Record(tmp_path), clock(60)) == 0
    again = run.Record(tmp_path)
    assert again.done(stage) and again.stages["train it"]["seconds"] > 0
    assert capsys.readouterr().out.count("train it") == 2
    with pytest.raises(UserError, match=r"train it was begun with another command \(more\)"):
        again.check([stages.Stage("train it", (*stage.command, "more"))])


def test_a_stage_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 0.5)
    assert run.run_stage(stages.Stage("deaf", ("-c", DEAF)), tmp_path, run.Record(tmp_path), clock(-1)) == 75


def test_a_stage_that_fails_shows_the_end_of_its_log(tmp_path, capsys):
    record = run.Record(tmp_path)
    assert run.run_stage(stages.Stage("x", ("-c", "print('why'); raise SystemExit(3)")), tmp_path, record, clock(60)) == 3
    told = capsys.readouterr().out
    assert "FAILED with 3" in told and told.rstrip().endswith("why") and not record.stages["x"]["done"]


def test_a_signal_ends_the_time(tmp_path):
    here = clock(60)
    assert here.left > 0
    here.ask(signal.SIGTERM, None)
    assert here.left == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--arms", "nft,ntf"], "there is no arm ntf"),
        (["--minutes", "1"], "--minutes is 1"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["trian.steps=1"], "unknown setting"),
        (["--data", "/nowhere"], "no file at /nowhere/gsm8k_train.jsonl"),
        (["--wheel", "/nowhere.whl"], "no file at /nowhere.whl"),
        (["--model", "/nowhere"], "no file at /nowhere/config.json"),
        (["--model", str(stages.MODEL), "--out", "/dev/null/x"], "/dev/null/x cannot be written to"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(tmp_path), "--model", str(tmp_path), *arguments])
    monkeypatch.setattr(run.outcome, "machine", lambda: {"gpus": [], "device": "CPU", "versions": {}})
    assert run.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and not list(tmp_path.iterdir())


def fake_evaluation(plan: stages.Plan, name: str, right: int, sampled: bool) -> None:
    """Six problems, of which the first `right` are solved."""
    greedy, eight, rows = [], [], []
    for position in range(6):
        good = position < right
        verdict, key = Verdict(float(good), "right" if good else "wrong", "1"), ("gsm8k", position)
        responses = [Response([1, 2], [0.0, 0.0], "stop", 0, f"{name} says", None, verdict) for _ in range(8)]
        greedy.append(Answered.of(key, f"gsm8k-{position}", "greedy", responses[:1]))
        eight.append(Answered.of(key, f"gsm8k-{position}", "sampled", responses))
        prompt = Prompt(f"gsm8k-{position}", "How many?", "1", (), "gsm8k")
        rows.append(kept._row(key, prompt, "greedy", 0, responses[0]))
    settings = SetSampling(k=8 if sampled else 0, temperature=1.0, top_p=1.0, greedy=True, max_tokens=9)
    result = set_result([*greedy, *(eight if sampled else [])], settings)
    content = {"label": name, "seed": 1, "sets": {"gsm8k": {"settings": asdict(settings), "fingerprint": "f", **result}}}
    file = plan.runs / "scores" / "evaluations" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    kept.write(kept.directory_of(plan.runs / "scores", name) / "part-0-00000.parquet", rows)


def fake_run(plan: stages.Plan, name: str) -> None:
    rows = [{"step": 0, "validation/heldout/greedy": 0.1}]
    rows += [{"step": step, "tokens": 1000, "train/updates": 4, "train/entropy": 0.5, "validation/heldout/greedy": 0.2} for step in (1, 2)]
    (plan.runs / name).mkdir(parents=True)
    (plan.runs / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_what_is_kept(tmp_path):
    """Numbers, table, curves and answers of the stages that are done; of an arm that is not, its rows."""
    plan, machine = plan_for(tmp_path), {"gpus": ["H200"], "device": "NVIDIA H200", "versions": {"torch": "2.11.0", "vllm": ""}}
    for name, right, sampled in (("model", 0, False), ("warm_start", 1, True), ("nft", 3, True)):
        fake_evaluation(plan, name, right, sampled)
    for name in ("nft", "rft"):
        fake_run(plan, name)
    done = {"sft": {"seconds": 60.0, "done": True}, "nft": {"seconds": 300.0, "done": True}, "rft": {"seconds": 30.0, "done": False}}
    out = tmp_path / "out"
    outcome.write(plan, done, machine, out, "python run.py")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["device"] == "NVIDIA H200" and summary["versions"] == {"torch": "2.11.0"}
    model, start, nft = summary["rows"]
    assert (model["greedy"], start["avg@8"], nft["avg@8"]) == (0.0, pytest.approx(1 / 6), 0.5) and "avg@8" not in model
    assert (nft["sampled_tokens"], nft["updates"], nft["steps"], nft["minutes"]) == (2000, 8, 2, 5.0)
    assert nft["difference"] == pytest.approx(1 / 3)
    table = (out / "arms.md").read_text()
    assert "| NFT | 2,000 | 8 | 50.0 [" in table and "NVIDIA H200" in table and "| warm start |" in table and "+33.3 [" in table
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [row["run"] for row in rows] == ["nft"] * 3 + ["rft"] * 3 and rows[2]["sampled"] == 2000
    answers = [json.loads(line) for line in (out / "answers.jsonl").open()]
    assert [row["model"] for row in answers[:3]] == ["model", "warm_start", "nft"] and len(answers) == 18
    assert answers[0]["response"] == "model says"
    assert (
        "gsm8k-0: `How many?` (1)\n\n- the model itself, wrong: `model says`\n- warm start, right: `warm_start says`\n- NFT, right:"
        in table
    )
    assert table.count("How many?") == outcome.SHOWN
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "accuracy.png"))
    assert len(list(out.iterdir())) == 8 and sum(file.stat().st_size for file in out.iterdir()) < 2e6


@pytest.mark.slow
def test_sizes_of_a_cpu_are_no_result(tmp_path):
    fake_evaluation(plan := plan_for(tmp_path, tiny=True, arms=()), "warm_start", 1, True)
    outcome.write(plan, {}, {"gpus": [], "device": "CPU, 2 cores; no GPU", "versions": {}}, tmp_path / "out", "python run.py --tiny")
    assert "CPU, 2 cores; no GPU, sizes of --tiny: no result" in (tmp_path / "out" / "arms.md").read_text()

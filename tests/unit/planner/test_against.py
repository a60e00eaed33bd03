"""A plan beside a run: medians, the run's own workload, errors, and which run may be compared with which plan."""

import json

import pytest

from megatron_nft import config
from megatron_nft.cli import main
from megatron_nft.logbook import MACHINE, METRICS
from megatron_nft.planner import against, run_rows
from megatron_nft.planner.workload import Workload

RANKS = 128  # of the 32B preset on 16 nodes
ROW = {"time/generate": 500.0, "time/rewards": 1.0, "time/batching": 4.0, "time/old_logprobs": 40.0, "time/train": 120.0, "time/sync": 10.0,
       "time/step": 680.0, "memory/generate": 60 * 2**30, "memory/train": 50 * 2**30, "tokens": 68_000_000, "train/response_length": 3000.0,
       "train/kept_response_length": 3100.0, "train/mixed_share": 0.5, "train/prompts_sent": 1024, "train/groups_kept": 512,
       "train/carried_groups": 0, "engine/prompt_tokens": 1024 * 16 * 200 / 2, "engine/0/tokens_per_second": 1.0,
       "engine/1/tokens_per_second": 1.0, "engine/tokens_per_second": 2.0}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run directory of rows; device, ranks: as its machine.json has them, None: it has none."""

    def make(rows: list[dict], device: str | None = "NVIDIA H100 80GB HBM3", ranks: int = RANKS, settings: str | None = None):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if device is not None:
            (folder / MACHINE).write_text(json.dumps({"device": device, "ranks": ranks, "kernels": ""}))
        if settings is not None:
            (folder / "config.yaml").write_text(settings)
        return folder

    return make


def rows(count: int = 6, **changes) -> list[dict]:
    """The first two slower, as they are; a validation before them."""
    first = [{"step": 0, "time/validate": 9.0, "time/step": 9.0}]
    slow = {"time/generate": 900.0, "time/step": 1080.0}
    return first + [{"step": step, **ROW, **(slow if step <= 2 else {}), **changes} for step in range(1, count + 1)]


def found(file, run_dir, **more):
    return against.compare(config.load(file), run_dir, **more)


def line(compared, name: str):
    return next(own for own in [*compared.lines, *compared.workload] if own.name == name)


def test_first_steps_are_left_out_and_medians_taken(run):
    own = rows()
    own[4]["time/generate"] = 5000.0  # one that a node held up
    own[5] |= {"time/validate": 100.0, "time/checkpoint": 20.0, "time/step": 800.0}
    steps = run_rows.RunRows(run(own))
    assert len(steps.rows) == 4 and steps.median("time/generate") == 500.0 and steps.median("time/validate") == 100.0
    assert steps.bare_seconds() == 680.0 and steps.tokens_per_second() == 100_000
    assert steps.median("memory/sync") is None


def test_the_runs_own_workload_is_planned_with(run, file):
    answered = run_rows.RunRows(run(rows())).answered(16)
    assert (answered.response, answered.kept_response, answered.mixed, answered.sent, answered.prompt) == (3000, 3100, 0.5, 1024, 200)
    fitted = run_rows.with_workload(config.load(file), 3000.0, answered)
    work = Workload.of(fitted)
    assert work.mean_length == pytest.approx(3000, rel=1e-6) and work.mean > 3000 and (work.mixed, work.prompt) == (0.5, 200)
    assert config.load(file).plan.mean_response_length is None


def test_a_run_that_carries_answers_does_not_tell_of_prompts(run):
    assert run_rows.RunRows(run(rows(**{"train/carried_groups": 3}))).answered(16).prompt is None


@pytest.mark.slow
def test_every_phase_has_its_error_and_the_goal(run, file):
    compared = found(file, run(rows()))
    assert compared.right_device and compared.steps == 4
    generate, stated = line(compared, "generate"), against.compare(config.load(file), run_rows.Path(compared.run_dir)).plan
    assert generate.measured == 500.0 and generate.stated == pytest.approx(stated.times.phases["generate"])
    assert generate.error == pytest.approx(generate.fitted / 500 - 1)
    assert generate.fitted < generate.stated  # more groups are mixed, and answers shorter, than the config states
    train = line(compared, "train")
    assert train.stated > stated.times.phases["train"]  # what had left the GPU comes back in it
    assert line(compared, "mean response length").fitted == pytest.approx(3000, rel=1e-3)
    assert line(compared, "groups sent").measured == 1024
    rate = line(compared, "sampled tokens of a GPU")
    assert rate.measured == pytest.approx(100_000 / 128) and line(compared, "memory in train").measured == 50
    text = compared.text()
    assert text.startswith("plan (estimate; what the GPU achieves: published") and "NOT A COMPARISON" not in text
    for name in (
        "generate, s",
        "sync, s",
        "step, without validation and saves, s",
        "sampled tokens, tokens/s",
        "memory in train, GiB",
        "goal 10%",
    ):
        assert name in text
    assert "a save, s" not in text  # no step had one
    content = compared.as_dict()
    assert {own["name"] for own in content["lines"]} >= {"generate", "train", "memory in generate"}
    assert all(own["met"] == (abs(own["error"]) <= 0.1) for own in content["lines"])


def test_the_counter_of_torch(planned):
    """Without what others allocate, and with what sleeps of vLLM."""
    own = planned()
    parts = own.memory.phases["train"]
    asleep = own.memory.phases["generate"]["vLLM weights"] + own.memory.phases["generate"]["KV cache"]
    assert against._torch_counts(own, "train") == sum(parts.values()) + asleep
    parts["NCCL and CUDA"] = 2**30
    assert against._torch_counts(own, "train") == sum(parts.values()) + asleep - 2**30


@pytest.mark.parametrize(
    ("device", "ranks", "said"),
    [
        ("CPU", RANKS, "the run was on CPU, and the plan is for H100: give --any-device"),
        ("NVIDIA H200", RANKS, "the run was on NVIDIA H200, and the plan is for H100: set plan.gpu=H200"),
        (None, RANKS, "the run does not say on what it was"),
        ("NVIDIA H100 80GB HBM3", 8, "the run had 8 ranks, the plan has 128 GPUs that train"),
    ],
)
def test_a_run_of_other_hardware_is_refused(device, ranks, said, run, file, capsys):
    assert main(["plan", str(file), "--against", str(run(rows(), device, ranks))]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_run_of_another_model_is_refused(run, file, capsys):
    folder = run(rows())
    its = json.loads((folder / MACHINE).read_text())
    parameters = found(file, folder).plan.memory.facts["parameters"]
    for ran, code in ((parameters, 0), (parameters - 1, 2)):
        (folder / MACHINE).write_text(json.dumps(its | {"parameters": ran}))
        assert main(["plan", str(file), "--against", str(folder)]) == code
    err = capsys.readouterr().err
    assert f"the run's model has {parameters - 1:,} parameters, the plan's {parameters:,}: set model.path" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_run_on_a_cpu_is_compared_when_asked_for_and_says_so(run, file, capsys):
    folder = run(rows(), "CPU", settings="train: {tokens_per_micro_batch: 64}\nrun_dir: elsewhere\n")
    assert main(["plan", str(file), "--against", str(folder), "--any-device"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NOT A COMPARISON OF HARDWARE: the run was on CPU, the plan is for H100\n")
    assert "the run had other settings than this config: train.tokens_per_micro_batch\n" in out
    assert main(["plan", str(file), "--against", str(folder), "--any-device", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["right_device"] is False and content["other_settings"] == ["train.tokens_per_micro_batch"]


@pytest.mark.parametrize(
    ("count", "more", "said"),
    [
        (2, [], "has 2 steps, of which the first 2 do not count"),
        (0, [], "has 0 steps"),
        (6, ["--search"], "--against has other things beside it"),
    ],
)
def test_what_cannot_be_compared_is_one_line(count, more, said, run, file, capsys):
    assert main(["plan", str(file), "--against", str(run(rows(count))), *more]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_no_run_and_a_damaged_one_are_one_line(run, file, tmp_path, capsys):
    assert main(["plan", str(file), "--against", str(tmp_path / "nowhere")]) == 2
    assert "no metrics.jsonl in" in capsys.readouterr().err
    folder = run(rows())
    (folder / MACHINE).write_text("{")
    assert main(["plan", str(file), "--against", str(folder)]) == 2
    assert "machine.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (METRICS, b"", "has 0 steps"),
        (METRICS, b'{"step": 1, "ti', "has 0 steps"),
        (METRICS, b'{"step": "one"}\n', "has 0 steps"),
        (METRICS, b'{"step": 1, "loss": 0.5}\n', f"step 1 of RUN/{METRICS} has no time/step: give the run_dir of a training"),
        (METRICS, b'{"step": 1, "time/step": null, "tokens": 1}\n', "has no time/step"),
        (METRICS, b'{"step": 1, "time/step": 1.0}\n', "has no tokens"),
        (METRICS, b"[1]\n", f"line 1 of RUN/{METRICS} is not JSON"),
        (METRICS, b"\xff\n", f"line 1 of RUN/{METRICS} is not JSON"),
        (MACHINE, b"\xff", "machine.json is damaged"),
        ("config.yaml", b"\xff", "config.yaml is damaged"),
    ],
)
def test_odd_files_of_a_run_are_one_line(name, content, said, run, file, capsys):
    folder = run(rows())
    (folder / name).write_bytes(content)
    assert main(["plan", str(file), "--against", str(folder)]) == 2
    err = capsys.readouterr().err
    assert said.replace("RUN", str(folder)) in err and err.count("\n") == 1


def test_a_replay_tells_of_no_workload(run):
    bare = [{name: value for name, value in row.items() if not name.startswith("train/")} for row in rows()]
    assert run_rows.RunRows(run(bare)).answered(16) is None

"""What the GPU benchmarks share: ratios, rows that fail, time that runs out, processes that die, kernels by kind, a step's parts."""

import argparse
import json
import os
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import yaml

from megatron_nft.config import Config, load
from megatron_nft.errors import UserError
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import common  # noqa: E402
import generation  # noqa: E402
import logprobs  # noqa: E402
import mismatch  # noqa: E402
import profiles  # noqa: E402
import step_shares  # noqa: E402
import train_step  # noqa: E402
import weight_stream  # noqa: E402


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(1.9, "<= 2", True), (2.1, "<= 2", False), (0.95, ">= 0.95", True), (0.94, ">= 0.95", False), (None, "<= 2", None), (3.0, None, None)],
)
def test_a_ratio_meets_its_goal_or_not(value, goal, met):
    found = common.ratio("x", value, goal)
    assert found["met"] is met
    line = common.ratio_line(found)
    assert ("not measured" in line) == (value is None) and ("MISSED" in line) == (met is False)


def test_quotients_of_rows_that_may_be_missing():
    assert common.quotient({"s": 3.0}, {"s": 2.0}, "s") == 1.5
    assert common.quotient({"s": 0.0}, {"s": 2.0}, "s") == 0.0
    assert common.quotient(None, {"s": 2.0}, "s") is None and common.quotient({"s": 1.0}, {"error": "x"}, "s") is None


def test_a_row_out_of_memory_is_told_and_other_errors_are_not_hidden():
    def out_of_memory():
        raise torch.OutOfMemoryError("x")

    assert common.row({"tokens": 4}, out_of_memory) == {"tokens": 4, "error": "out of memory"}
    assert common.row({"tokens": 4}, lambda: {"seconds": 1.0}) == {"tokens": 4, "seconds": 1.0}
    with pytest.raises(ZeroDivisionError):
        common.row({}, lambda: 1 / 0)


def test_timing_counts_what_comes_after_the_warm_up_and_ends_with_the_budget():
    ran = []
    common.timed(lambda: ran.append(0), repeats=3, warm_up=2)
    assert len(ran) == 5
    ran.clear()
    common.timed(lambda: ran.append(0), repeats=3, warm_up=2, budget=common.Budget(0.0))
    assert len(ran) == 3  # one that counts
    assert set(common.in_turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=2)) == {"a", "b"}
    assert ran[3:] == ["a", "b"] * 3


SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
import common
def one(job):
    if job["does"] == "dies":
        print("went wrong", file=sys.stderr)
        os._exit(3)
    if job["does"] == "hangs":
        time.sleep(60)
    return {{"pid": os.getpid()}}
arguments = common.parser("x", 1).parse_args()
common.work_off(arguments, one)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT).format(folder=str(ROOT / "benchmarks" / "gpu")))
    return str(path)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_own_row(script, capsys):
    jobs = [{"does": "works"}, {"does": "dies"}, {"does": "works"}, {"does": "works"}]
    first, dead, third, fourth = common.measure(script, jobs, [], common.Budget(300))
    assert dead == {"does": "dies", "error": "exit code 3, went wrong"}
    assert first["pid"] != third["pid"] == fourth["pid"]


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_when_the_time_is_over(script, monkeypatch):
    monkeypatch.setattr(common, "GRACE", 0.0)
    rows = common.measure(script, [{"does": "hangs"}, {"does": "works"}], [], common.Budget(1.0))
    assert [row["error"] for row in rows] == ["out of time", "no time was left"]


def test_the_result_has_its_form(tmp_path, capsys):
    path = tmp_path / "new" / "x.json"
    common.finish("x", [{"tokens": 1}], [common.ratio("r", 1.0, "<= 2")], path, profiles={"a": 1})
    found = json.loads(path.read_text())
    assert list(found) == ["benchmark", "device", "date", "versions", "command", "rows", "ratios", "profiles"]
    assert found["versions"]["torch"] and found["device"] == common.device() and "goal <= 2" in capsys.readouterr().out


def test_a_result_without_a_figure_is_written_and_ends_with_1(tmp_path):
    with pytest.raises(SystemExit, match="x: nothing was measured: exit code 3"):
        common.finish("x", [{"tokens": 1, "error": "exit code 3"}], [], tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["tokens"] == 1


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (logprobs, ["--tokens", "0"], "argument --tokens: 0 is no number of 1 or more"),
        (logprobs, ["--seconds", "0"], "argument --seconds: 0 is no number of seconds above 0"),
        (logprobs, ["--json", "FOLDER"], "FOLDER is a folder"),
        (logprobs, ["--json", "FILE/x.json"], "FILE cannot be written to"),
        (train_step, ["--steps", "-1"], "argument --steps"),
        (train_step, ["--models", "qwen3"], "invalid choice: 'qwen3'"),
        (generation, ["nowhere"], "no config.json in nowhere: give the directory of a Hugging Face model"),
        (mismatch, ["--data", "nowhere"], "no file at nowhere"),
        (step_shares, ["nowhere"], "no metrics.jsonl in nowhere"),
    ],
    ids=range(9),
)
def test_wrong_arguments_are_one_line(script, arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    places = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        arguments, said = [one.replace(name, place) for one in arguments], said.replace(name, place)
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.parse()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("script.py: ") and said in told and told.count("\n") == 1


def test_a_gpu_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    def refuse():
        raise UserError("the NVIDIA driver is for CUDA 12.4", "update the driver")

    monkeypatch.setattr(common, "check_machine", refuse)
    monkeypatch.setattr(sys, "argv", ["script.py", "--tiny"])
    with pytest.raises(SystemExit) as ended:
        logprobs.parse()
    assert ended.value.code == 2 and capsys.readouterr().err == "script.py: the NVIDIA driver is for CUDA 12.4: update the driver\n"


def test_vllm_by_itself_starts_its_engine_in_a_new_process(tmp_path, monkeypatch):
    """A fork of a process that has asked torch for GPUs can use none, and vLLM does not see that it has."""
    seen = {}
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **_: seen.update(os.environ)))
    config = Config(run_dir="unused")
    config.model.path = str(tmp_path)
    generation.vllms(config, 8)
    assert seen["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and seen["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


# ---- kernels


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("void flash::FlashAttnFwdSm90<...>", "attention"),
        ("void transformer_engine::rmsnorm_fwd_tuned_kernel", "norms"),
        ("void transformer_engine::detail::cast_transpose_fused_kernel_notaligned", "FP8 casts and transposes"),
        ("void multi_tensor_apply_kernel<..., AdamFunctorMaster<...>>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda>", "elementwise and reductions"),
        ("aten::addmm", "matrix products"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert profiles.kind_of(name) == kind


def event(name, ts, dur, **more):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "tid": 1, **more}


def test_idle_is_what_no_kernel_covers():
    events = [event("gemm", 0, 100), event("copy", 50, 100), event("gemm", 200, 100)]  # 50 of them at once, 50 nothing
    found = profiles.table_of(events).found
    assert found["span_seconds"] == pytest.approx(300e-6) and found["kinds"][profiles.IDLE] == pytest.approx(50e-6)
    assert found["kinds"]["matrix products"] == pytest.approx(200e-6) and found["kernels"][0]["count"] == 2


def test_an_operators_own_time_is_without_those_it_calls():
    cpu = [event("aten::linear", 0, 100), event("aten::addmm", 10, 60), event("aten::copy_", 20, 10), event("aten::mul", 100, 5)]
    found = profiles.operators([e | {"cat": "cpu_op"} for e in cpu])
    assert [(e["name"], e["own"]) for e in found] == [("aten::linear", 40), ("aten::addmm", 50), ("aten::copy_", 10), ("aten::mul", 5)]


def test_work_on_the_device_leaves_out_ranges_and_the_cpu():
    events = [
        event("gemm", 0, 1),
        event("range", 0, 9, cat="gpu_user_annotation"),
        event("x", 0, 1, cat="cpu_op"),
        {"ph": "M", "name": "m"},
    ]
    assert [e["name"] for e in profiles.device_work(events)] == ["gemm"]


# ---- ratios of the train step, shares of a step


def row(precision, layers, seconds, **more):
    return {"model": "qwen2.5-32b", "precision": precision, "tokens": 16384, "layers_seconds": layers, "seconds": seconds, **more}


def test_one_recipe_of_fp8_is_enough():
    rows = [row("bf16", 3.0, 4.0, mfu=0.52), row("tensorwise", 2.0, 3.2), row("blockwise", 2.5, 3.5), row("delayed", 9.0, 9.0, error="x")]
    found = {one["name"]: one for one in train_step.ratios(rows, ["qwen2.5-32b"], [4096, 16384])}
    assert found["qwen2.5-32b, 16384 tokens: MFU in BF16"]["met"] is True
    fp8 = [found[f"qwen2.5-32b, 16384 tokens: FP8 {recipe} over BF16, layers"] for recipe in ("tensorwise", "blockwise")]
    assert [(one["value"], one["met"]) for one in fp8] == [(1.5, True), (1.2, None)]
    assert found["qwen2.5-32b, 16384 tokens: FP8 tensorwise over BF16, whole step"]["value"] == 1.25
    assert found["qwen2.5-32b, 4096 tokens: MFU in BF16"]["value"] is None


def test_without_a_recipe_that_meets_the_goal_it_is_missed():
    rows = [row("bf16", 3.0, 4.0, mfu=0.3), row("tensorwise", 2.5, 3.2)]
    found = train_step.ratios(rows, ["qwen2.5-32b"], [16384])
    assert [one["met"] for one in found if one["goal"] == train_step.FP8_GOAL] == [False, None, None]


def test_shares_of_a_step():
    """8 of 10 seconds generate and train; the checkpoint, the validation and the first step do not count."""
    one = {"time/generate": 5.0, "time/old_logprobs": 1.0, "time/train": 2.0, "time/sync": 1.0, "time/step": 10.0, "tokens": 100}
    rows = [{"step": 0, "time/validate": 9.0}, {"step": 1, **one, "time/sync": 99.0, "time/step": 200.0}]
    rows += [{"step": 2, **one, "engine/busy_seconds": 4.0}]
    rows += [{"step": 3, **one, "time/checkpoint": 5.0, "time/checkpoint_write": 50.0, "time/step": 15.0}]
    found = step_shares.shares(rows, skip=1)
    assert found["rest"] == pytest.approx(0.2) and found["engine_idle"] == pytest.approx(0.2) and found["steps"] == 2
    assert found["seconds"] == pytest.approx({"generate": 5, "old_logprobs": 1, "train": 2, "sync": 1, "other": 1})


def test_tiny_takes_its_time():
    assert (
        common.budget_of(argparse.Namespace(tiny=True, seconds=1.0)).left
        > 60
        > common.budget_of(argparse.Namespace(tiny=False, seconds=1.0)).left
    )


def test_the_small_run_of_step_shares_has_settings_that_are_taken(tmp_path, monkeypatch):
    """As they are on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(step_shares.config_of(tmp_path, tmp_path / "run", argparse.Namespace(prompts=16, answer=256)))
    )
    assert load(tmp_path / "run.yaml", []).rollout.vllm == {"compilation_config": common.GRAPHS_ALONE}


def test_weight_stream_tells_what_it_has_where_the_engine_was_not_reached():
    alone = {"model": "a", "stream_seconds": 3.0, "copy_seconds": 2.0}
    [found] = weight_stream.ratios({"error": "no time was left"}, alone)
    assert found["value"] == 1.5 and found["met"]
    assert weight_stream.ratios({"error": "no time was left"}, {"error": "out of memory"}) == []

"""Bad input: exit code 2, one line on stderr that names the fault and the mend, nothing written."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_nft import report
from megatron_nft.cli import main
from tests.support import ROOT, add_tokenizer, tiny_model

CONFIG = """
run_dir: {folder}/run
model: {{path: {folder}/model}}
data: {{train: [{{path: {folder}/data.jsonl}}], max_prompt_length: 64}}
rollout: {{max_tokens: 64}}
sft: {{data: [{{path: {folder}/data.jsonl}}]}}
evaluation: {{sets: [{{path: {folder}/data.jsonl}}]}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A config that is right, so that each test breaks one thing."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"problem": "What is 2*3+4?", "answer": "10"}) + "\n")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    add_tokenizer(tiny_model(tmp_path / "model", vocab_size=304))
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("megatron-nft: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


BAD_SETTINGS = {
    "optimizer.learning_rate=1": "unknown setting optimizer.learning_rate",
    "rollout.temprature=1": "did you mean rollout.temperature?",
    "train.steps=many": "train.steps",
    "train.steps": "write it as key=value",
    "objective.neg_weight=-0.5": "objective.neg_weight",
    "model.path=nowhere": "no model directory at nowhere",
    "data.train=[]": "no data set is given",
    "data.train.0.path=nowhere.jsonl": "no data file at nowhere.jsonl",
    "data.train.0.question=question": "has no column question; it has problem, answer",
    "data.max_prompt_length=3": "too_long 1",
    "reward.function=strict_boxx": "there is no verdict function 'strict_boxx'",
    "reward.function=nowhere.py:f": "no file at nowhere.py",
    "rollout.function=nowhere.py:f": "rollout function 'nowhere.py:f': no file at nowhere.py",
    "replay=nowhere": "where no run has saved its answers",
    "parallel.tensor_model_parallel_size=3": "attention heads (4) cannot be divided by parallel.tensor_model_parallel_size (3)",
    "parallel.pipeline_model_parallel_size=3": "layers (4) cannot be divided",
    "parallel.tensor_model_parallel_size=2": "world size 1 is not divisible",
    "rollout.max_tokens=200": "data.max_prompt_length (64) and rollout.max_tokens (200) are together more than the model's window (256",
    "rollout.n=0": "rollout.n is 0: use a finite number, 1 or more",
    "rollout.n=-3": "rollout.n is -3: use a finite number, 1 or more",
    "rollout.max_num_seqs=7": "rollout.max_num_seqs (7) is less than rollout.n (8)",
    "rollout.stop=['a', 3]": "rollout.stop holds 3, which is no string",
    "rollout.stop=['']": "rollout.stop holds an empty string",
    "rollout.vllm={max_model_len: 9}": "rollout.vllm.max_model_len has a setting of its own: set data.max_prompt_length",
    "train.watchdog_phases={sleep: 9}": "train.watchdog_phases names 'sleep'",
    "train.tokens_per_micro_batch=127": "is less than data.max_prompt_length + rollout.max_tokens (128)",
    "rollout.tensor_parallel_size=2": "does not divide the number of processes (1)",
    "run_dir=setup.py/run": "cannot be written",
    "evaluation.sets.0.limit=0": "use 1 or more",
    "seed=-1": "seed is -1",
    "preset=dapoo": "there is no preset 'dapoo': did you mean dapo",
    "objective.eps=0": "objective.eps is 0.0: use a number above 0",
    "objective.name=drgrpo": "objective.name is 'drgrpo': use one of nft, rft, grpo, dr_grpo",
    "rollout.n=1": "rollout.n is 1, but nft compares the answers to a prompt",
}


@pytest.mark.parametrize("override", BAD_SETTINGS)
def test_train_refuses(override, folder, capsys):
    for flag in ([], ["--dry-run"]):
        assert BAD_SETTINGS[override] in refused(capsys, "train", str(folder / "config.yaml"), override, *flag)
    assert not (folder / "run").exists()


def test_train_refuses_a_correction_of_tokens_for_a_ratio_of_answers(folder, capsys):
    settings = ["objective.ratio=sequence", "objective.correction.method=truncate"]
    assert "objective.correction.level token" in refused(capsys, "train", str(folder / "config.yaml"), *settings)


def test_a_config_that_is_missing_or_broken(folder, capsys):
    assert "no config file at" in refused(capsys, "train", str(folder / "no.yaml"))
    (folder / "config.yaml").write_text("run_dir: [")
    assert "mend the YAML" in refused(capsys, "train", str(folder / "config.yaml"))


def test_a_broken_data_file(folder, capsys):
    (folder / "data.jsonl").write_text('{"problem": "x", "answer": "1"}\n{"problem": \n')
    assert "line 2 of" in refused(capsys, "train", str(folder / "config.yaml"))


def test_a_damaged_model(folder, capsys):
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged or incomplete" in refused(capsys, "train", str(folder / "config.yaml"))


def test_a_run_directory_in_use(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("")
    assert "already holds a run" in refused(capsys, "train", str(folder / "config.yaml"), "resume=false")


def test_sft_needs_solutions(folder, capsys):
    assert "has no solution" in refused(capsys, "sft", str(folder / "config.yaml"))
    assert "sft.data is empty" in refused(capsys, "sft", str(folder / "config.yaml"), "sft.data=[]")


def test_evaluate_needs_problems(folder, capsys):
    assert "no problem to evaluate on" in refused(capsys, "evaluate", str(folder / "config.yaml"), "evaluation.sets=[]")
    assert "no model directory" in refused(capsys, "evaluate", str(folder / "config.yaml"), "model.path=nowhere")


BAD_EVALUATIONS = {
    "evaluation.k=0 evaluation.greedy=false": "greedy is false and k is 0 for the set data",
    "evaluation.sets.0.k=0 evaluation.greedy=false": "greedy is false and k is 0 for the set data",
    "evaluation.sets.0.k=-1": "k of the set data is -1: use a finite number, 0 or more",
    "evaluation.sets.0.k=1000000000": "k of the set data is over 16384",
    "evaluation.temperature=.nan": "evaluation.temperature is nan",
    "evaluation.sets.0.temperature=.nan": "temperature of the set data is nan",
    "evaluation.sets.0.top_p=0": "top_p of the set data is 0.0",
    "evaluation.sets.0.max_tokens=0": "max_tokens of the set data is 0",
    "evaluation.only=[dat]": "evaluation.only names 'dat', which is no set of evaluation.sets: did you mean data?",
    "evaluation.sets=[{benchmark:mathh500}]": "there is no benchmark 'mathh500': did you mean math500?",
    "evaluation.name=step_3": "evaluation.name is 'step_3'",
    "evaluation.name=a/b": "evaluation.name is 'a/b'",
    f"evaluation.name={'a' * 200}": "evaluation.name is 'aaa",
    "evaluation.checkpoint=last": "use best, newest or step_N",
    "evaluation.sets.0.path=nowhere.jsonl": "no data file at nowhere.jsonl",
}


@pytest.mark.parametrize("overrides", BAD_EVALUATIONS)
def test_evaluate_refuses(overrides, folder, capsys):
    words = [word.replace(":", ": ") for word in overrides.split()]
    assert BAD_EVALUATIONS[overrides] in refused(capsys, "evaluate", str(folder / "config.yaml"), *words)
    assert not (folder / "run").exists()


def test_overrides_may_stand_after_the_flag(folder, capsys):
    assert "optimizer.lr is -1" in refused(capsys, "train", str(folder / "config.yaml"), "--dry-run", "optimizer.lr=-1")
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(folder / "config.yaml"), "--wet-run"])
    assert "unrecognized arguments: --wet-run" in capsys.readouterr().err


def test_report_and_convert_need_their_directories(folder, capsys):
    assert "no run directory" in refused(capsys, "report", str(folder / "nowhere"))
    assert "nowhere" in refused(capsys, "convert", "hf-to-megatron", str(folder / "nowhere"), str(folder / "out"))
    assert "nowhere" in refused(capsys, "convert", "megatron-to-hf", str(folder / "nowhere"), str(folder / "out"))
    assert "nowhere" in refused(capsys, "convert", "verify", str(folder / "nowhere"))
    assert not (folder / "out").exists()


def test_a_dry_run_says_what_it_found_and_writes_nothing(folder, capsys):
    assert main(["train", str(folder / "config.yaml"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "objective.eps" in out and "nft as published" in out  # what the settings resolved to
    assert "1 training prompts" in out and "1 validation problems in data" in out and not err
    assert "tokens: median" in out and "(end of the prompt)" in out and "gold" in out
    assert not (folder / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_lets_settings_for_gpus_pass_and_names_them(folder, capsys):
    settings = ["rollout.quantization=fp8", "optimizer.optimizer_cpu_offload=true", "model.fp8=hybrid"]
    assert main(["train", str(folder / "config.yaml"), "--dry-run", *settings]) == 0
    noted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("for a machine with GPUs: ")]
    assert sorted(line.split()[5].split(".")[-1] for line in noted) == ["fp8", "optimizer_cpu_offload", "quantization"]
    for setting in settings:
        assert setting.split("=")[0] in refused(capsys, "train", str(folder / "config.yaml"), setting)


def test_the_process_exits_with_2_and_no_traceback(folder):
    command = [sys.executable, "-m", "megatron_nft", "train", str(folder / "config.yaml"), "nonsense=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-nft: unknown setting nonsense") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EIO, None)])
def test_a_full_disk_is_one_line(number, code, monkeypatch, capsys):
    def fail(path):
        raise OSError(number, "told by the system", str(path / "metrics.jsonl"))

    monkeypatch.setattr(report, "write_report", fail)
    if code is None:
        with pytest.raises(OSError):
            main(["report", "runs/mine"])
    else:
        assert main(["report", "runs/mine"]) == code
        said = "megatron-nft: told by the system (runs/mine/metrics.jsonl): make room; the same command goes on from what is saved\n"
        assert capsys.readouterr().err == said

"""The program as a user runs it: the reward rises, the run directory is complete, what it exports loads elsewhere."""

import json
import os
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_nft.cli import main
from tests.end_to_end.runs import DEMO, SETTINGS, rows, run


def test_the_reward_rises(finished):
    """By at least 10 points in eight steps of two updates, from some 30 %."""
    rates = [row["train/correct_rate"] for row in rows(finished[0]) if row["step"] > 0]
    assert len(rates) == 8
    assert sum(rates[-2:]) / 2 > sum(rates[:2]) / 2 + 0.1


def test_the_run_directory_is_complete(finished):
    run_dir, printed = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "config.yaml",
        "machine.json",
        "metrics.jsonl",
        "rollouts",
        "evaluations",
        "checkpoints",
        "huggingface",
        "report.html",
        "wandb",
    } <= names
    kinds = ("coefficients", "step")
    assert sorted(p.name for p in (run_dir / "rollouts").iterdir()) == [f"{kind}_{n}.parquet" for kind in kinds for n in range(1, 9)]
    assert sorted(p.name for p in (run_dir / "evaluations").iterdir()) == ["step_0.json", "step_4.json", "step_8.json"]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_6", "step_8"]  # keep: 2
    assert "heldout greedy" in printed and f"report: {run_dir / 'report.html'}" in printed
    assert "Warning" not in printed


def test_the_sampler_had_the_trainers_weights_at_every_step(finished):
    """Mean |log pi_sampler - log pi_trainer| of the sampled tokens: 1e-5 in float32."""
    differences = [row["train/logprob_difference"] for row in rows(finished[0]) if row["step"] > 0]
    assert 0 < max(differences) < 1e-5


def test_a_plan_is_put_beside_the_run(finished, capsys):
    """Though it was on a CPU, as asked for; its own steps are the measured side."""
    run_dir, _ = finished
    assert json.loads((run_dir / "machine.json").read_text())["ranks"] == 1
    arguments = ["plan", str(DEMO / "nft.yaml"), *SETTINGS, "plan.nodes=1", "plan.gpus_per_node=1", "--against", str(run_dir)]
    assert main([*arguments, "--any-device", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 6 and not found["right_device"] and not found["other_settings"]
    lines = {line["name"]: line for line in found["lines"]}
    assert {"generate", "train", "sync", "a validation", "a save", "memory in train"} <= lines.keys()
    trained = sorted(row["time/train"] for row in rows(run_dir) if row["step"] > 2)
    assert lines["train"]["measured"] == (trained[2] + trained[3]) / 2
    workload = {line["name"]: line["measured"] for line in found["workload"]}
    assert 10 < workload["mean response length"] <= 64 and workload["groups kept"] == 32


def test_the_export_loads_in_transformers(finished):
    exported = finished[0] / "huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is 10*2+10?"}], add_generation_prompt=True, return_tensors="pt")
    answer = tokenizer.decode(model.generate(chat["input_ids"], max_new_tokens=40, do_sample=False)[0])
    assert "\\boxed{" in answer


def test_the_run_is_evaluated_stopped_and_gone_on(finished, tmp_path):
    """A run directory is its newest checkpoint here. Stopped after 20 of 64 problems and gone on, the evaluation is what the training's own
    validation of that step was, problem by problem."""
    settings = [f"model.path={finished[0]}", "evaluation.checkpoint=newest", "evaluation.sets.0.limit=64", "evaluation.k=1",
                "rollout.max_num_seqs=16", "rollout.cpu_kvcache_space=1"]  # fmt: skip
    printed = run("evaluate", tmp_path, *settings, log=tmp_path / "log", at={"problems": 20, "signal": "SIGTERM"}, code=75)
    there = int(re.search(r"stopped on request with (\d+) of 64 problems answered; the same command goes on", printed)[1])
    assert 20 <= there < 64 and "Traceback" not in printed and not (tmp_path / "evaluations" / "run-step_8.json").exists()
    printed = run("evaluate", tmp_path, *settings, log=tmp_path / "log")
    assert f"{there} of 64 problems are answered" in printed and (tmp_path / "report.html").is_file()
    result, expected = (json.loads((folder / "evaluations" / f"{name}.json").read_text()) for folder, name in
                        ((tmp_path, "run-step_8"), (finished[0], "step_8")))  # fmt: skip
    assert result["sets"] == expected["sets"] and len(result["sets"]["heldout"]["by_problem"]) == 64
    printed = run("evaluate", tmp_path, *settings, "evaluation.temperature=0.6", log=tmp_path / "refused", code=2)
    assert "temperature of heldout was 1.0, and is 0.6" in printed


@pytest.mark.skipif(os.environ.get("MEGATRON_NFT_LONG") != "1", reason="make test-long")
def test_what_megatron_lm_saved_is_evaluated_in_place_by_two_engines(tmp_path):
    """A directory without config, tokenizer and manifest: the results are those of the Hugging Face directory that it was made from."""
    assert main(["convert", "hf-to-megatron", str(DEMO / "model"), str(tmp_path / "ours")]) == 0
    saved = tmp_path / "pretrain" / "iter_0000003"
    saved.mkdir(parents=True)
    for file in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"):
        (tmp_path / "ours" / file).rename(saved / file)
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("3")
    settings = ["evaluation.sets.0.limit=32", "evaluation.k=2", "rollout.cpu_kvcache_space=1"]
    theirs = [f"model.path={saved.parent}", f"evaluation.hf_config={DEMO / 'model'}"]
    run("evaluate", tmp_path / "run", *settings, *theirs, log=tmp_path / "log", ranks=2)
    run("evaluate", tmp_path / "run", *settings, log=tmp_path / "log")
    results = [json.loads((tmp_path / f"run/evaluations/{name}.json").read_text()) for name in ("pretrain-iter_0000003", "model")]
    assert results[0]["sets"] == results[1]["sets"] and not list((tmp_path / "run").glob(".model-*"))
    answers = sorted(file.name for file in (tmp_path / "run/evaluations/pretrain-iter_0000003.answers").glob("*.parquet"))
    assert answers[0].startswith("part-0-") and answers[-1].startswith("part-1-")

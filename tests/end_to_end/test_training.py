"""The program as a user runs it: the reward rises, the run directory is complete, what it exports loads elsewhere."""

import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.runs import rows, run


def test_the_reward_rises(finished):
    """By at least 10 points in eight steps of two updates, from some 30 %."""
    rates = [row["train/correct_rate"] for row in rows(finished[0]) if row["step"] > 0]
    assert len(rates) == 8
    assert sum(rates[-2:]) / 2 > sum(rates[:2]) / 2 + 0.1


def test_the_run_directory_is_complete(finished):
    run_dir, printed = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "rollouts", "evaluations", "checkpoints", "huggingface", "report.html", "wandb"} <= names
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


def test_the_export_loads_in_transformers_and_the_checkpoint_is_evaluated(finished, tmp_path):
    exported = finished[0] / "huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is 10*2+10?"}], add_generation_prompt=True, return_tensors="pt")
    answer = tokenizer.decode(model.generate(chat["input_ids"], max_new_tokens=40, do_sample=False)[0])
    assert "\\boxed{" in answer
    settings = [f"model.path={finished[0] / 'checkpoints' / 'step_8'}", "evaluation.sets.0.limit=64", "evaluation.k=1"]
    printed = run("evaluate", tmp_path, *settings, log=tmp_path / "log")
    result = json.loads((tmp_path / "evaluations" / "step_8.json").read_text())
    last = [row for row in rows(finished[0]) if "validation/heldout/greedy" in row][-1]
    assert result["sets"]["heldout"]["greedy"] == last["validation/heldout/greedy"]
    assert "heldout" in printed

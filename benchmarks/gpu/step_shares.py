"""Where a rollout step's time goes, and the share of it that neither generates nor trains.

    python benchmarks/gpu/step_shares.py [RUN_DIR ...] [--skip 1] [--json FILE]                    of runs that have been
    python benchmarks/gpu/step_shares.py [--model DIR] [--steps 4] [--json FILE] [--seconds N] [--tiny]     of a small one, made for this

Read from metrics.jsonl, time/<stage>: medians over the steps after the first --skip, validation and checkpoints left out; generating is the
stage generate, training old_logprobs and train, the rest batching, sync (sleep and wake are in sync and generate) and what is between the
stages. Beside it the share of generate in which the engine itself was not busy. The small run is NFT with random weights of Qwen2.5-1.5B's
shapes (or a model directory), --prompts x 8 answers of --answer tokens, all trained on: its verdicts are all wrong, which changes no
tensor's shape. It is ended when its steps are logged, before it would save.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import yaml

from benchmarks.stages import WORK, stage_seconds
from megatron_nft.logbook import METRICS, read_rows

GOAL, WRITE = "<= 0.05", "checkpoint_write"


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=100)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--skip", type=int, default=1, help="steps at the start, in which kernels are chosen and graphs captured")
    parser.add_argument("--model", type=common.model_directory)
    parser.add_argument("--steps", type=common.positive, default=4)
    parser.add_argument("--prompts", type=common.positive, default=32)
    parser.add_argument("--answer", type=common.positive, default=512)
    given = parser.parse_args()
    if missing := [run for run in given.runs if not (run / METRICS).is_file()]:
        parser.error(f"no {METRICS} in {missing[0]}: give the run_dir of a training")
    return given


def config_of(model: Path, run_dir: Path, arguments: argparse.Namespace) -> dict:
    """The small run's YAML."""
    return {
        "run_dir": str(run_dir),
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(common.ROOT / "examples" / "arithmetic" / "prompts.jsonl")}], "max_prompt_length": 128},
        "rollout": {
            "prompts_per_step": arguments.prompts,
            "n": 8,
            "max_tokens": arguments.answer,
            "dynamic_sampling": False,
            "gpu_memory_utilization": 0.4,
            "max_num_seqs": min(8 * arguments.prompts, 512),
            "cpu_kvcache_space": 1,
            "logprob_tolerance": 1.0,  # random weights: what is measured is time
            "vllm": {"compilation_config": common.GRAPHS_ALONE},
        },
        "objective": {"name": "nft"},
        "train": {
            "steps": 10**6,
            "prompts_per_update": max(arguments.prompts // 4, 1),
            "tokens_per_micro_batch": 16384 if torch.cuda.is_available() else 2048,
        },
        "checkpoint": {"interval": 0},
        "evaluation": {"interval": 0},
    }


def run_small(arguments: argparse.Namespace, budget: common.Budget) -> list[dict]:
    """Rows of metrics.jsonl of a run made for this. Raises SystemExit where it ends by itself."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = common.shape("tiny" if arguments.tiny else "qwen2.5-1.5b")
        model = arguments.model or common.write_model(shape, folder / "model")
        common.free()
        (folder / "config.yaml").write_text(yaml.safe_dump(config_of(model, folder / "run", arguments)))
        command = [sys.executable, "-m", "megatron_nft", "train", str(folder / "config.yaml")]
        with subprocess.Popen(command, cwd=common.ROOT, start_new_session=True) as run:
            metrics = folder / "run" / METRICS
            try:
                while run.poll() is None and budget.left and len(_lines(metrics)) < arguments.steps:
                    time.sleep(0.2)
                ended = run.poll()
            finally:
                common.end(run)
        if ended is not None:
            raise SystemExit(f"the run ended with {ended} before its steps were done")
        return read_rows(metrics) if metrics.exists() else []


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def shares(rows: list[dict], skip: int) -> dict:
    """{"seconds": {stage: median}, "rest": share, "engine_idle": share of generate or None, "steps": how many}; rows of metrics.jsonl."""
    writes = f"time/{WRITE}"  # goes on beside the steps
    steps = [{key: value for key, value in row.items() if key != writes} for row in rows if row["step"] > 0][skip:]
    if not steps:
        raise SystemExit(f"there are no steps after the first {skip}")
    seconds = stage_seconds(steps)
    rest = 1 - sum(seconds.get(name, 0.0) for name in WORK) / sum(seconds.values())
    idle = [
        1 - row["engine/busy_seconds"] / row["time/generate"] for row in steps if "engine/busy_seconds" in row and row.get("time/generate")
    ]
    found = {"steps": len(steps), "tokens": statistics.median(row.get("tokens", 0) for row in steps), "seconds": seconds}
    return found | {"rest": rest, "engine_idle": statistics.median(idle) if idle else None}


def show(found: dict) -> None:
    total = sum(found["seconds"].values())
    print(f"\n{found['run']}: {found['steps']} steps of {found['tokens']:,.0f} sampled tokens\n{'stage':<16}{'seconds':>10}{'share':>9}")
    for name, spent in found["seconds"].items():
        print(f"{name:<16}{spent:>10.3f}{spent / total:>9.1%}")


def main() -> None:
    arguments = parse()
    budget = common.budget_of(arguments)
    if arguments.tiny:
        arguments.steps, arguments.prompts, arguments.answer = 2, 4, 8
    if arguments.runs:
        found = [{"run": str(run)} | shares(read_rows(run / METRICS), arguments.skip) for run in arguments.runs]
    else:
        found = [{"run": "a small run"} | shares(run_small(arguments, budget), arguments.skip)]
    ratios = []
    for one in found:
        show(one)
        ratios.append(common.ratio(f"{one['run']}: share of a step that neither generates nor trains", one["rest"], GOAL))
        ratios.append(common.ratio(f"{one['run']}: share of generate in which the engine is not busy", one["engine_idle"]))
    common.finish("step_shares", found, ratios, arguments.json)


if __name__ == "__main__":
    main()

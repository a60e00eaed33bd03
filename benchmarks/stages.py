"""Where the time of the demo goes: share of a step by stage, weight sync, engine start, and the wait for the first trained step.

    .venv/bin/python benchmarks/stages.py [--steps N]

Runs `make demo` for N rollout steps (6 by default) with a clock on its output, then starts the policy and the engine once more
to time the engine's start and the weight sync on their own. The limits are those the project holds itself to.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from megatron_nft import config, policy, rollout
from megatron_nft.logbook import read_rows

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "arithmetic" / "nft.yaml"
WORK = ("generate", "old_logprobs", "train")  # generating and training
NOT_A_STEP = ("validate", "checkpoint")  # not part of every step
SYNCS = 9


def first_step_seconds(steps: int, run_dir: Path) -> float:
    """Run `make demo`; returns the seconds from the command to the line of the first trained step."""
    command = ["make", "--silent", "demo", f"DEMO_RUN={run_dir}", f"DEMO_ARGS=train.steps={steps}"]
    started, first = time.perf_counter(), None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as demo:
        for line in demo.stdout:
            if first is None and line.startswith("step 1/"):
                first = time.perf_counter() - started
    if demo.returncode or first is None:
        raise SystemExit("make demo failed")
    return first


def stage_seconds(rows: list[dict]) -> dict[str, float]:
    """Median seconds of a stage over the trained steps; "other" is what no stage covers."""
    steps = [row for row in rows if row["step"] > 0]
    names = [key.removeprefix("time/") for key in steps[0] if key.startswith("time/") and key != "time/step"]
    names = [name for name in names if name not in NOT_A_STEP]
    for row in steps:
        row["time/other"] = row["time/step"] - sum(row.get(f"time/{name}", 0.0) for name in (*names, *NOT_A_STEP))
    return {name: statistics.median(row.get(f"time/{name}", 0.0) for row in steps) for name in (*names, "other")}


def engine_and_sync() -> tuple[float, float]:
    """(seconds to start the engine, vLLM's import included; median seconds of a weight sync), for the demo's model."""
    settings = config.load(DEMO, ["run_dir=unused"])
    topology = policy.initialize(settings.parallel, settings.seed)
    model = policy.Policy(settings, topology)
    started = time.perf_counter()
    engine = rollout.Engine(settings.model.path, settings.rollout, config.max_model_len(settings), "fp32", settings.seed)
    engine_seconds, syncs = time.perf_counter() - started, []
    for version in range(SYNCS):
        started = time.perf_counter()
        engine.sync(model.hand_over(), version)
        syncs.append(time.perf_counter() - started)
    engine.close()
    policy.shutdown()
    return engine_seconds, statistics.median(syncs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        first = first_step_seconds(steps, Path(folder) / "run")
        seconds = stage_seconds(read_rows(Path(folder) / "run" / "metrics.jsonl"))
    engine, sync = engine_and_sync()
    total = sum(seconds.values())
    print(f"{'stage':<14}{'seconds':>9}{'share':>8}   (medians over {steps} steps)")
    for name, spent in seconds.items():
        print(f"{name:<14}{spent:>9.3f}{spent / total:>8.1%}")
    rest = 1 - sum(seconds[name] for name in WORK) / total
    print()
    for what, value, limit in (
        ("neither generating nor training", f"{rest:.1%}", "10 %"),
        ("weight sync", f"{sync * 1000:.0f} ms", "150 ms"),
        ("engine start", f"{engine:.1f} s", "30 s"),
        ("`make demo` to the first trained step", f"{first:.1f} s", "60 s"),
    ):
        print(f"{what:<40}{value:>10}   limit {limit}")


if __name__ == "__main__":
    main()

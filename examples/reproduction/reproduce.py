"""The paper's comparison on two CPU cores: NFT, RFT, GRPO, Dr.GRPO and DAPO from one base, and ablations of NFT's knobs.

    python examples/reproduction/reproduce.py [--quick] [--jobs N] [--out RUNS_DIR] [key=value ...]

Trains the bases when they are missing, then every arm with every seed, N at a time on one thread each. A run that is complete is left
alone, one that was cut off goes on: the same command again picks up where it stopped. At the end `summary.py` writes the table, the
curves and what of the paper's findings holds here. --quick: NFT and RFT, one seed, two sevenths of the tokens, under ten minutes.
Settings (key=value) go over all arms' own, e.g. optimizer.lr=1e-4; they want an --out of their own, and leave docs/ alone.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import summary
from arms import ABLATIONS, COMMON, FROM_STRONG, OBJECTIVES, SEEDS, Run

from megatron_nft.logbook import progress

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICK_TOKENS = 200_000
OUT = ROOT / "runs" / "reproduction"
ARITHMETIC = ROOT / "examples" / "arithmetic"


@dataclass(frozen=True)
class Base:
    """A warm start: which model goes in (None: a random one), for how many steps, and where it lies."""

    model: Path | None
    steps: int
    lr: float
    folder: str


BASES = {"weak": Base(None, 500, 2e-3, "base"), "strong": Base(ARITHMETIC / "model", 400, 5e-4, "strong")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two objectives, one seed, fewer tokens")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over all arms' own")
    given = parser.parse_args()
    given.out = given.out.absolute()  # runs start in the repository's root, wherever this one was started
    if given.settings and given.out == OUT:
        parser.error(f"settings of your own do not belong among the runs of {OUT}: name another place with --out")
    if any(setting.replace(" ", "") == "evaluation.interval=0" for setting in given.settings):
        parser.error("the table is made of validations: evaluation.interval has to be above 0")
    runs = list(quick_runs(given.out, given.settings) if given.quick else full_runs(given.out, given.settings))
    train_all(runs, given.jobs)
    summary.write(runs, given.out, given.out if given.quick or given.out != OUT else ROOT / "docs")


def full_runs(out: Path, settings: list[str]) -> Iterator[Run]:
    """The objectives with all seeds first, from either base, then the ablations seed by seed."""
    bases = {name: make_base(name, out) for name in BASES}
    for names in (OBJECTIVES, FROM_STRONG, ABLATIONS):
        for seed in SEEDS:
            runs = (Run(name, seed, out) for name in names)
            yield from (replace(run, more=(f"model.path={bases[run.base]}", *settings)) for run in runs)


def quick_runs(out: Path, settings: list[str]) -> Iterator[Run]:
    base = make_base("weak", out)
    for name in ("NFT", "RFT"):
        yield Run(name, SEEDS[0], out / "quick", (f"model.path={base}", f"train.sampled_tokens={QUICK_TOKENS}", *settings))


def make_base(name: str, out: Path) -> Path:
    """A base, by a warm start on worked answers, some six minutes for the weak one and three for the strong."""
    base = out / BASES[name].folder / "huggingface"
    if (base / "config.json").exists():
        return base
    print(f"training the {name} base, {BASES[name].steps} steps", flush=True)
    call([str(ARITHMETIC / "make_model.py"), str(out / "random")])
    call([str(ARITHMETIC / "make_data.py"), str(out / "data")])
    settings = {"run_dir": base.parent, "model.path": BASES[name].model or out / "random", "sft.data.0.path": out / "data" / "worked.jsonl",
                "sft.steps": BASES[name].steps, "optimizer.lr": BASES[name].lr, "checkpoint.interval": 100}  # fmt: skip
    call(["-m", "megatron_nft", "sft", str(ARITHMETIC / "sft.yaml"), *(f"{key}={value}" for key, value in settings.items())])
    return base


def call(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def train_all(runs: list[Run], jobs: int) -> None:
    """Train what is not complete. After a failure the runs under way go on to their end and no other starts."""
    left = [run for run in runs if not run.complete]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are complete, {len(left)} to go, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool, progress(len(left), "reproduce", "runs", interval=0.0) as bar:
        for done in as_completed([pool.submit(train, run) for run in left]):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            done.result()
            bar.update()


def train(run: Run) -> None:
    """One run as a process of its own; what it prints goes to DIRECTORY.log."""
    run.directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_nft", "train", str(COMMON), *run.overrides]
    log = run.directory.with_suffix(".log")
    with log.open("a") as output:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{run.name}, seed {run.seed}: exit code {done.returncode}; its last lines, of {log}:\n{tail(log)}")


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-10:])


if __name__ == "__main__":
    main()

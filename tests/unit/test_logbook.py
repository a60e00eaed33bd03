"""The logbook: rows on disk, cutting on resume, what is shown on a terminal and off it, a real wandb directory."""

import io
import json
from contextlib import contextmanager

import pytest
import torch

from megatron_nft import logbook
from megatron_nft.balance import Balance
from megatron_nft.config import STAGES, LoggingConfig
from megatron_nft.errors import UserError
from megatron_nft.logbook import Logbook, held, progress, read_rows, remove_later


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(logbook.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def write_steps(run_dir, steps, first_step=0, total=10, stream=None):
    with Logbook(run_dir, "run", total, first_step, stream=stream or io.StringIO()) as log:
        for step in steps:
            log.add({"train/correct_rate": step / 100}, tokens=50)
            log.commit(step)


def test_stage_seconds_add_up_and_the_row_spans_them(tmp_path, clock):
    with Logbook(tmp_path, "run", 2, stream=io.StringIO()) as log:
        clock(7)  # start-up, before the first stage
        with log.stage("generate"):
            clock(2)
            with log.stage("rewards"):  # inside another: the outer one's
                clock(1)
        clock(0.5)
        with log.stage("train"):
            clock(4)
        with log.stage("generate"):
            clock(1)
        log.commit(1)
        with log.stage("train"):
            clock(3)
        log.commit(2)
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert {k: v for k, v in first.items() if k.startswith("time/")} == {"time/generate": 4, "time/train": 4, "time/step": 8.5}
    assert {k: v for k, v in second.items() if k.startswith("time/")} == {"time/train": 3, "time/step": 3}
    assert (first["step"], second["step"]) == (1, 2)


def test_a_stage_that_raises_is_closed(tmp_path, clock):
    log = Logbook(tmp_path, "run", 1, stream=io.StringIO())
    with pytest.raises(ValueError, match="broken"), log.stage("train"):
        clock(2)
        raise ValueError("broken")
    with log.stage("sync"):
        clock(1)
    row = log.commit(1)
    log.close()
    assert (row["time/train"], row["time/sync"]) == (2, 1)


def test_tensors_become_numbers(tmp_path):
    with Logbook(tmp_path, "run", 1, stream=io.StringIO()) as log:
        log.add({"train/loss": torch.tensor(0.5)}, tokens=3)
        log.commit(1)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["train/loss"] == 0.5
    assert row["tokens"] == 3


def test_a_committed_row_is_on_disk_at_once(tmp_path):
    log = Logbook(tmp_path, "run", 1, stream=io.StringIO())
    log.commit(1)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_resume_cuts_rows_beyond_the_checkpoint(tmp_path):
    write_steps(tmp_path, range(6))
    write_steps(tmp_path, [4, 5, 6], first_step=3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_fresh_start_begins_an_empty_file(tmp_path):
    write_steps(tmp_path, range(6))
    write_steps(tmp_path, [0, 1])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_torn_last_line_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    write_steps(tmp_path, [3], first_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("step", [1, 2])
def test_a_row_that_was_begun_goes_on(step, tmp_path):
    """The rows before it stay, that of step 0 too; its own is written once."""
    write_steps(tmp_path, range(4))
    with Logbook(tmp_path, "run", 3, step, stream=io.StringIO(), row={"tokens": 7, "time/train": 1.5}) as log:
        log.add({"validation/set/greedy": 0.5})
        log.commit(step)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(step + 1))
    assert (rows[-1]["tokens"], rows[-1]["time/train"], rows[-1]["validation/set/greedy"]) == (7, 1.5, 0.5)


def test_files_of_later_steps_are_removed(tmp_path):
    kept = ["step_2.parquet", "step_2-1.parquet", "step_10.txt.bak", "huggingface.json", "coefficients_2.parquet"]
    later = ["step_3.parquet", "step_3-1.parquet", "step_10.json", "step_4.parquet.part"]
    for name in [*kept, *later, "coefficients_3.parquet", "coefficients_10.parquet.part"]:
        (tmp_path / name).write_text("")
    remove_later(tmp_path, 2)
    remove_later(tmp_path / "nowhere", 2)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


@pytest.mark.parametrize("broken", [b'{"ste', b"[1]", b"\xff"])
def test_a_broken_line_in_the_middle_is_named(broken, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_rows(path)


def test_plain_lines_when_output_is_no_terminal(tmp_path, clock):
    stream = io.StringIO()
    with Logbook(tmp_path, "run", 4, stream=stream) as log:
        with log.stage("validate"):
            clock(30)
        log.add({"validation/sums/greedy": 0.25, "validation/sums/avg@8": 0.125})
        log.commit(0)
        with log.stage("generate"):
            clock(5)
        log.add({"train/correct_rate": 0.4321}, tokens=10_000)
        log.commit(1)
        log.note("a note")
    first, second, third = stream.getvalue().splitlines()
    assert first == "step 0/4  sums/greedy 25.0%  sums/avg@8 12.5%  30 s"
    assert second == "step 1/4  correct 43.2%  2,000 tokens/s  5.0 s  15 s left"
    assert third == "a note"


def test_a_bar_on_a_terminal(tmp_path, clock):
    stream = Terminal()
    with Logbook(tmp_path, "run", 4, stream=stream) as log:
        log.add({"validation/sums/greedy": 0.25})
        log.commit(0)
        with log.stage("generate"):
            clock(5)
        log.add({"train/correct_rate": 0.4321}, tokens=10_000)
        log.commit(1)
        log.note("a note")
    shown = stream.getvalue()
    assert "run [generate]" in shown
    newest = [part for part in shown.split("\r") if part.startswith("run step 1/4 |")][-1]
    assert all(part in newest for part in ("sums/greedy 25.0%", "correct 43.2%", "2,000 tokens/s", "15 s left"))
    assert "a note\n" in shown


def test_other_ranks_only_time_their_stages(tmp_path, clock):
    stream = io.StringIO()
    log = Logbook(tmp_path / "run", "run", 4, enabled=False, wandb=LoggingConfig(wandb="offline"), stream=stream)
    with log.stage("train"):
        clock(2)
    log.add(tokens=3)
    log.note("a note")
    row = log.commit(1)
    log.close()
    assert row["time/train"] == 2
    assert "tokens" not in row
    assert stream.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_progress_in_plain_lines(clock):
    stream = io.StringIO()
    for _ in progress(range(4), "reading", "files", stream=stream, interval=10):
        clock(6)
    assert stream.getvalue().splitlines() == [
        "reading: 2/4 files, 0.2/s, 12 s left",
        "reading: 4/4 files, 0.2/s, 0.0 s left",
        "reading: 4 files in 24 s",
    ]


def test_progress_by_hand_and_on_a_terminal(clock):
    stream = io.StringIO()
    with progress(100, "convert", "tensors", stream=stream) as bar:
        bar.update(40)
    assert stream.getvalue() == "convert: 40 tensors in 0.0 s\n"
    terminal = Terminal()
    assert list(progress([1, 2, 3], "convert", "tensors", stream=terminal)) == [1, 2, 3]
    assert "3/3" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (89, "89 s"), (120, "2 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min")]
)
def test_duration(seconds, text):
    assert logbook.duration(seconds) == text


@pytest.mark.slow
def test_a_real_offline_wandb_run(tmp_path):
    wandb = pytest.importorskip("wandb")
    settings = LoggingConfig(wandb="offline", project="test", name="first")
    for first_step in (0, 1):  # a run, and its continuation
        with Logbook(tmp_path, "run", 2, first_step, wandb=settings, config={"seed": 1}, stream=io.StringIO()) as log:
            log.add({"train/loss": 0.5}, tokens=3)
            log.commit(first_step + 1)
    wandb.teardown()  # its service writes the files' last bytes when it ends, as at the end of a process
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    for run in runs:
        (record,) = run.glob("run-*.wandb")
        assert b"train/loss" in record.read_bytes()
        assert (tmp_path / "wandb_id.txt").read_text().strip() in run.name


class Meter:
    """Peaks as told, one for each stage."""

    def __init__(self, *peaks: int):
        self.peaks, self.started = list(peaks), 0

    def start(self) -> None:
        self.started += 1

    def peak(self) -> int:
        return self.peaks.pop(0)


def test_peak_memory_of_a_stage(tmp_path):
    meter = Meter(50, 70, 60)
    with Logbook(tmp_path, "run", 1, stream=io.StringIO(), meter=meter) as log:
        for name in ("generate", "train", "generate"):
            with log.stage(name), log.stage("within"):  # the inner one is the outer one's
                pass
        row = log.commit(1)
    assert (row["memory/generate"], row["memory/train"], meter.started) == (60, 70, 3) and "memory/within" not in row


def ranks(*seconds: dict[str, float]):
    """A gather whose ranks are these: the first is the one that asks."""
    return lambda own: [own, *([of_rank.get(stage, 0.0) for stage in STAGES] for of_rank in seconds)]


def test_the_slowest_rank_is_named(tmp_path, clock):
    """A rank's own seconds where they are told, its stage's otherwise; a line at most every ten steps."""
    stream, balance = io.StringIO(), Balance(ranks({"train": 2.0, "sync": 1.0}, {"train": 9.0, "sync": 1.0}), ["a", "a", "b"])
    with Logbook(tmp_path, "run", 12, stream=stream, balance=balance) as log:
        for step in range(1, 13):
            with log.stage("train"):
                clock(8)
            log.own("train", 0.5)
            log.own("train", 0.5)  # of two updates; the other seven seconds it waited
            with log.stage("sync"):
                clock(1)
            log.own("generate", None)
            log.commit(step)
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert {key: value for key, value in row.items() if key.startswith("balance/")} == {
        "balance/train": 9 / 4,
        "balance/train_slowest": "rank 2 on b",
        "balance/sync": 1.0,
        "balance/sync_slowest": "rank 0 on a",
    }
    assert row["time/train"] == 8
    lines = [line for line in stream.getvalue().splitlines() if "busy" in line]
    assert lines == [f"step {step}: train: rank 2 on b was busy for 9.0 s, 2.25 times the ranks' mean" for step in (1, 11)]


def test_short_stages_and_small_differences_are_no_news(tmp_path, clock):
    stream, balance = io.StringIO(), Balance(ranks({"train": 0.1, "generate": 108.0}), ["a", "b"])
    with Logbook(tmp_path, "run", 1, stream=stream, balance=balance) as log:
        for stage, seconds in (("train", 0.9), ("generate", 100.0)):
            with log.stage(stage):
                clock(seconds)
        row = log.commit(1)
    assert (row["balance/train"], row["balance/generate"]) == (pytest.approx(1.8), pytest.approx(108 / 104))
    assert "busy" not in stream.getvalue()


def test_one_rank_is_compared_with_nobody(tmp_path):
    def gather(own):
        raise AssertionError("no call for one rank")

    with Logbook(tmp_path, "run", 1, stream=io.StringIO(), balance=Balance(gather, ["a"])) as log:
        with log.stage("train"):
            pass
        assert not [key for key in log.commit(1) if key.startswith("balance/")]


def test_all_ranks_compare_and_one_writes(tmp_path):
    asked = []
    balance = Balance(lambda own: asked.append(own) or [own, own], ["a", "b"])
    with Logbook(tmp_path, "run", 1, enabled=False, balance=balance) as log:
        with log.stage("train"):
            pass
        log.commit(1)
    assert len(asked) == 1 and asked[0][STAGES.index("train")] > 0 and not (tmp_path / "metrics.jsonl").exists()


def test_seconds_of_an_earlier_process_are_compared_with_nobodys(tmp_path, clock):
    """A row that a resumed run owes has them: the first rank's, on every rank."""
    balance = Balance(ranks({"validate": 3.0}), ["a", "b"])
    with Logbook(tmp_path, "run", 3, 1, stream=io.StringIO(), row={"time/train": 1.5}, balance=balance) as log:
        with log.stage("validate"):
            clock(1)
        owed = log.commit(1)
        with log.stage("train"):
            clock(2)
        after = log.commit(2)
    assert owed["time/train"] == 1.5 and (owed["balance/validate"], owed["balance/validate_slowest"]) == (1.5, "rank 1 on b")
    assert "balance/train" not in owed and after["balance/train"] == 2


def test_a_stage_runs_in_what_is_put_around_it(tmp_path):
    seen = []

    @contextmanager
    def around(name):
        seen.append(name)
        yield
        seen.append("end")

    with Logbook(tmp_path, "run", 1, stream=io.StringIO(), around=around) as log, log.stage("train"), log.stage("within"):
        seen.append("work")
    assert seen == ["train", "work", "end"]


def test_a_run_directory_is_one_runs(tmp_path, monkeypatch):
    with held(tmp_path / "run"):
        with pytest.raises(UserError, match="run is in use by another run"), held(tmp_path / "run"):
            pass
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path / "run"):  # the first rank holds it for all
            pass
        monkeypatch.delenv("RANK")
    with held(tmp_path / "run"):
        pass

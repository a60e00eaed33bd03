"""A run's curves, tables and sample answers as one self-contained HTML page, and the table at the end of a training."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from statistics import median

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from omegaconf import OmegaConf

from megatron_nft import charts, samples
from megatron_nft.errors import UserError
from megatron_nft.evaluation import page, tables
from megatron_nft.logbook import METRICS, duration, read_rows


@dataclass(frozen=True)
class Accuracy:
    """A validation metric over the run; values in 0..1."""

    name: str  # "<set> greedy" or "<set> avg@k"
    before: float
    before_step: int
    after: float
    after_step: int
    best: float
    best_step: int

    @property
    def gain(self) -> float:
        """In points of 0..1."""
        return self.after - self.before


@dataclass(frozen=True)
class Totals:
    """What a run took."""

    steps: int
    tokens: int
    seconds: float
    stages: tuple[tuple[str, float, float], ...]  # name, seconds, share of the whole


def _rows_if_any(run_dir: str | Path, evaluated: list[page.Shown]) -> list[dict]:
    """As load_rows; none where the directory has evaluations and no step of a training. Raises UserError where it has neither."""
    path = Path(run_dir) / METRICS
    return load_rows(run_dir) if not evaluated or (path.is_file() and read_rows(path)) else []


def load_rows(run_dir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, by step. UserError where there is no run, or nothing in it."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run directory at {run_dir}", "give the run_dir of a training")
    path = run_dir / METRICS
    if not path.is_file():
        raise UserError(f"no {METRICS} in {run_dir}", "give the run_dir of a training that has begun")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no complete step", "wait for the first step to end")
    return sorted(rows, key=lambda row: row["step"])


def with_sampled(rows: list[dict]) -> list[dict]:
    """The rows, each with `sampled`: the tokens sampled up to it."""
    return [row | {"sampled": sampled} for row, sampled in zip(rows, accumulate(row.get("tokens", 0) for row in rows), strict=True)]


def accuracies(rows: list[dict]) -> list[Accuracy]:
    """First, last and best value of every validation metric."""
    found = []
    for series in charts.validation_series({key: None for row in rows for key in row}):
        points = [(row["step"], row[series.key]) for row in rows if series.key in row]
        best = max(points, key=lambda point: point[1])
        found.append(Accuracy(series.label, points[0][1], points[0][0], points[-1][1], points[-1][0], best[1], best[0]))
    return found


def totals(rows: list[dict]) -> Totals:
    """Steps, sampled tokens, seconds, and how the seconds divide over the stages ("other": between them)."""
    seconds = sum(row.get("time/step", 0.0) for row in rows)
    stages = [(name, sum(row.get(f"time/{name}", 0.0) for row in rows)) for name in charts.stage_names(rows)]
    stages.append(("other", max(0.0, seconds - sum(spent for _, spent in stages))))
    shares = tuple((name, spent, spent / seconds if seconds else 0.0) for name, spent in stages)
    return Totals(rows[-1]["step"], int(sum(row.get("tokens", 0) for row in rows)), seconds, shares)


def slowest(rows: list[dict]) -> list[tuple[str, float, float, int, str, float]]:
    """Of every stage that ranks were compared in: its name, the slowest rank's seconds over the ranks' mean in the median step, and in the
    worst, which that was; the rank that most often was the slowest, and in what share of the steps. None of a run of one rank."""
    found = []
    for stage in charts.stage_names(rows):
        told = [(row[f"balance/{stage}"], row["step"], row[f"balance/{stage}_slowest"]) for row in rows if f"balance/{stage}" in row]
        if told:
            [(who, times)] = Counter(who for *_, who in told).most_common(1)
            worst, step, _ = max(told)
            found.append((stage, median(ratio for ratio, *_ in told), worst, step, who, times / len(told)))
    return found


def summary(run_dir: str | Path) -> str:
    """The plain-text table at the end of a training: accuracy before and after, tokens, minutes by stage; and the evaluations there are."""
    evaluated = page.evaluations(run_dir)
    rows = _rows_if_any(run_dir, evaluated)
    shown = [f"{one.name}\n{tables.aligned(one.tables[0][1])}" for one in evaluated]
    parts = [*([_training_summary(rows)] if rows else []), *shown, f"report: {Path(run_dir) / 'report.html'}"]
    return "\n\n".join(parts)


def _training_summary(rows: list[dict]) -> str:
    spent, scores = totals(rows), accuracies(rows)
    width = max([len("validation"), *(len(one.name) for one in scores), *(len(name) for name, _, _ in spent.stages)])
    lines = []
    if scores:
        lines.append(f"{'validation':<{width}}  {'before':>8}  {'after':>8}  {'gain':>9}")
        lines += [f"{one.name:<{width}}  {one.before:>8.1%}  {one.after:>8.1%}  {one.gain * 100:>+5.1f} pts" for one in scores]
        lines.append("")
    lines.append(f"{spent.steps} steps, {spent.tokens:,} sampled tokens, {spent.seconds / 60:.1f} minutes")
    lines += ["", f"{'stage':<{width}}  {'minutes':>8}  {'share':>8}"]
    lines += [f"{name:<{width}}  {seconds / 60:>8.2f}  {share:>8.1%}" for name, seconds, share in spent.stages]
    return "\n".join(lines)


def write_report(run_dir: str | Path) -> Path:
    """Make run_dir/report.html from metrics.jsonl, and config.yaml, rollouts/ and evaluations/ where they are; returns its path. Of a
    directory without a training it has the evaluations alone."""
    run_dir = Path(run_dir)
    evaluated = page.evaluations(run_dir)
    rows = _rows_if_any(run_dir, evaluated)
    config_file = run_dir / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    environment = Environment(loader=PackageLoader("megatron_nft", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    about = header(run_dir, rows, config_text)
    text = environment.get_template("report.html.jinja").render(
        **about,
        accuracies=accuracies(rows),
        totals=totals(rows) if rows else None,
        slowest=slowest(rows),
        stage_colours=charts.STAGES,
        charts=[(chart.title, chart.reading, Markup(charts.svg(chart, rows))) for chart in charts.charts_of(rows)] if rows else [],
        samples=samples.sample_answers(run_dir, about["model"]),
        evaluations=evaluated,
        method=tables.METHOD,
        config=config_text,
    )
    path = run_dir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def header(run_dir: Path, rows: list[dict], config_text: str) -> dict[str, str]:
    """Title, model, objective and dates; empty strings where they are not known."""
    config = OmegaConf.create(config_text) if config_text else OmegaConf.create({})
    objective = OmegaConf.to_container(config.get("objective") or OmegaConf.create({}))
    stamps = [datetime.fromtimestamp(row["timestamp"]).astimezone() for row in rows if "timestamp" in row]
    dates = f"{stamps[0]:%Y-%m-%d %H:%M} to {stamps[-1]:%Y-%m-%d %H:%M %Z}" if stamps else ""
    return {
        "title": OmegaConf.select(config, "logging.name") or run_dir.resolve().name,
        "model": OmegaConf.select(config, "model.path", throw_on_missing=False) or "",
        "objective": ", ".join(str(value) if name == "name" else f"{name} {value}" for name, value in objective.items()),
        "dates": dates,
    }


def curves_png(run_dirs: dict[str, str | Path], out: str | Path) -> None:
    """Draw the validation accuracy of several runs (label -> run directory) against the step into one PNG file."""
    runs = {label: load_rows(run_dir) for label, run_dir in run_dirs.items()}
    for label, rows in runs.items():
        if not accuracies(rows):
            raise UserError(
                f"the run {label} ({run_dirs[label]}) has no validation", "set evaluation.sets and evaluation.interval, or leave it out"
            )
    charts.compare_png(runs, out)

"""The curves of a run, drawn by matplotlib: inline SVG for the report page, a PNG to compare runs."""

import io
import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6db3", "#d9772b", "#3a9a5b", "#c2483f", "#7c5cb0"
TEAL, BROWN, PINK, GREY, OLIVE = "#2a9d9d", "#8c6d4f", "#d07aa8", "#8b929a", "#a8a332"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, BROWN, PINK, OLIVE, GREY)
STAGES = {"generate": BLUE, "rewards": ORANGE, "batching": OLIVE, "old_logprobs": TEAL, "train": GREEN, "sync": PURPLE,
          "validate": PINK, "checkpoint": BROWN, "log": GREY, "other": "#d3d7db"}  # fmt: skip
POINTS = 60  # of the common axis of token_curve
STYLE = {"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#9aa1a8", "axes.labelcolor": "#59616a", "xtick.color": "#59616a", "ytick.color": "#59616a", "axes.grid": True,
         "grid.color": "#e7eaed", "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One curve: a metric's key, its name in the legend, colour and line style."""

    key: str
    label: str
    colour: str
    line: str = "-"


@dataclass(frozen=True)
class Chart:
    """One picture. kind: line | stack (areas) | share (areas that add up to 100 %). Values are divided by `divisor`."""

    title: str
    reading: str  # how to read it, one sentence
    series: tuple[Series, ...]
    unit: str = ""  # "%" draws shares in 0..1 as per cent
    kind: str = "line"
    divisor: float = 1.0
    whole: bool = False  # the axis starts at 0
    smooth: bool = True  # with many points, a moving average over the faint raw curve


CHARTS = (
    Chart("Correct rate in training", "Share of right answers among all that were sampled, and among the mixed groups trained on.",
          (Series("train/correct_rate", "all groups", BLUE), Series("train/kept_correct_rate", "mixed groups", ORANGE)), "%"),
    Chart("Entropy", "Of the next-token distribution, in nats; a fall to 0 means the answers no longer vary.",
          (Series("train/entropy", "entropy", PURPLE),), whole=True),
    Chart("Response length", "Mean tokens of a sampled answer.", (Series("train/response_length", "tokens", TEAL),), whole=True),
    Chart("Truncated answers", "Share of answers that ran into the token limit.", (Series("train/truncated_share", "truncated", RED),), "%",
          whole=True),
    Chart("Probability ratio R", "New over old probability of a token; 1 means the policy has not moved within the step.",
          (Series("train/ratio_max", "maximum", ORANGE), Series("train/ratio_mean", "mean", BLUE))),
    Chart("Clip share", "Share of the tokens of right and of wrong answers that the objective's clip cuts (NFT: wrong ones, at eps).",
          (Series("train/clip_share_right", "right answers", GREEN), Series("train/clip_share_wrong", "wrong answers", RED)), "%",
          whole=True),
    Chart("Token coefficients", "Mean push on log-probability: up for tokens of right answers, down for those of wrong ones.",
          (Series("train/positive_coefficient", "right answers", GREEN), Series("train/negative_coefficient", "wrong answers", RED),
           Series("train/coefficient", "all", GREY))),
    Chart("Gradient norm", "Before clipping, mean over the updates of a step.", (Series("train/grad_norm", "norm", BLUE),), whole=True),
    Chart("Clipped updates", "Share of the updates whose gradient norm was above optimizer.clip_grad.",
          (Series("train/clipped_updates", "clipped", ORANGE),), "%", whole=True),
    Chart("Group mixing", "Share of prompts with both right and wrong answers: the only ones a step can learn from.",
          (Series("train/mixed_share", "mixed", GREEN),), "%", whole=True),
    Chart("Prompts", "Prompts sent to the sampler, and mixed groups kept for training.",
          (Series("train/prompts_sent", "sent", GREY), Series("train/groups_kept", "kept", GREEN)), whole=True),
    Chart("Verdicts", "What the reward function said of the sampled answers.",
          tuple(Series(f"train/outcome/{name}", name.replace("_", " "), colour) for name, colour in
                (("right", GREEN), ("wrong", RED), ("no_answer", GREY), ("timed_out", ORANGE), ("crashed", PURPLE))), "%", "share"),
    Chart("Sampler against trainer", "Mean absolute difference of the two log-probabilities of the same sampled tokens.",
          (Series("train/logprob_difference", "difference", BROWN),), whole=True),
    Chart("Sampler mismatch", "KL divergence of the trainer's pi_old from the sampler, per token, in nats.",
          (Series("train/mismatch_k3", "k3 estimate", PURPLE),), whole=True),
    Chart("Effective sample size", "Of the samples weighted by pi_old / pi_sampler, and the share of weights that the correction cut.",
          (Series("train/effective_sample_size", "effective", TEAL), Series("train/truncated_weights", "cut", RED)), "%", whole=True),
    Chart("Loss", "With NFT its value says little: read accuracy, R and the clip share instead.", (Series("train/loss", "loss", GREY),)),
    Chart("Learning rate", "At the end of the step.", (Series("train/lr", "learning rate", OLIVE),), whole=True, smooth=False),
)  # fmt: skip


def charts_of(rows: list[dict]) -> list[Chart]:
    """The charts for which these rows hold at least one metric, accuracy first and stage times last."""
    keys = {key: None for row in rows for key in row}  # a set that keeps the order
    memory = tuple(Series(key, key.removeprefix("memory/"), colour)
                   for key, colour in zip((k for k in keys if k.startswith("memory/")), PALETTE, strict=False))  # fmt: skip
    present = [name for name in stage_names(rows) if name != "other"]
    stages = tuple(Series(f"time/{name}", name.replace("_", " "), STAGES.get(name, GREY)) for name in present)
    balance = tuple(replace(series, key=series.key.replace("time/", "balance/")) for series in stages)
    every = (
        Chart(
            "Validation accuracy", "On held-out problems: one greedy answer, and the mean of k sampled ones.", validation_series(keys), "%"
        ),
        *CHARTS,
        Chart("Seconds by stage", "Wall time of each step, without the time between stages.", stages, "s", "stack"),
        Chart("Slowest rank", "Its own seconds in a stage over the mean of all ranks; 1 means that nobody waits.", balance, smooth=False),
        Chart("Memory", "Peak of each phase, in GiB.", memory, "GiB", divisor=2**30, whole=True),
    )
    return [chart for chart in every if any(series.key in keys for series in chart.series)]


def stage_names(rows: list[dict]) -> list[str]:
    """The stages that these rows time, in the order of a step; a checkpoint is written beside them."""
    names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")} - {"step", "checkpoint_write"}
    return [name for name in STAGES if name in names] + sorted(names - STAGES.keys())


def validation_series(keys: dict | list) -> tuple[Series, ...]:
    """A series for each validation metric: a colour for each set, solid for greedy and dashed for avg@k."""
    names = [key.removeprefix("validation/").rpartition("/") for key in keys if key.startswith("validation/")]
    names.sort(key=lambda name: (name[0], name[2] != "greedy", name[2]))  # greedy first
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(name[0] for name in names))}
    return tuple(Series(f"validation/{of_set}/{way}", f"{of_set} {way}", colours[of_set], "-" if way == "greedy" else "--")
                 for of_set, _, way in names)  # fmt: skip


def svg(chart: Chart, rows: list[dict]) -> str:
    """The chart as an <svg> element that needs nothing outside it."""
    with rc_context({**STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(6.2, 2.9), layout="constrained")
        _draw(figure.subplots(), chart, rows)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    return embedded(buffer.getvalue())


def embedded(text: str) -> str:
    """What matplotlib wrote, as an <svg> element that may stand in a page beside others."""
    text = text[text.index("<svg") :]  # without the XML header, which names a DTD on the network
    text = re.sub(r'<g id="[^"]+_\d+"', "<g", text)  # figure_1, axes_1 ...: an id may stand once in a page
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)


def compare_png(runs: dict[str, list[dict]], out: str | Path) -> None:
    """Validation accuracy against step for several runs (label -> rows) as one PNG: a colour for each run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        series = {label: validation_series({key: None for row in rows for key in row}) for label, rows in runs.items()}
        sets = {one.label.rpartition(" ")[0] for many in series.values() for one in many}
        for (label, rows), colour in zip(runs.items(), PALETTE * len(runs), strict=False):
            for one in series[label]:
                name = one.label if len(sets) > 1 else one.label.rpartition(" ")[2]
                _line(axes, Series(one.key, f"{label}, {name}", colour, one.line), rows)
        _finish(axes, "%", legend=True)
        axes.set_xlabel("rollout step")
        axes.set_ylabel("validation accuracy")
        figure.savefig(out, dpi=150, format="png")


def token_curve(axes: Axes, runs: list[list[dict]], key: str, label: str, colour: str) -> None:
    """A metric against thousands of sampled tokens (`sampled` of report.with_sampled): the mean over the runs on a common axis, and a band
    from the lowest to the highest. Runs that have not the metric draw nothing."""
    tracks = [[(row["sampled"] / 1000, row[key]) for row in rows if key in row] for rows in runs]
    tracks = [track for track in tracks if track]
    if not tracks:
        return
    tokens = np.linspace(max(track[0][0] for track in tracks), min(track[-1][0] for track in tracks), POINTS)
    values = np.array([np.interp(tokens, *zip(*track, strict=True)) for track in tracks])
    axes.plot(tokens, values.mean(0), color=colour, linewidth=1.8, label=label)
    if len(tracks) > 1:
        axes.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)


def finish_token_axes(axes: Axes, percent: bool, bottom: float | None = None) -> None:
    """Axis formats and the legend of token_curves; bottom: where the vertical axis begins, None: where the curves do."""
    axes.set_xlabel("thousand sampled tokens")
    axes.set_ylim(bottom=bottom)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _draw(axes: Axes, chart: Chart, rows: list[dict]) -> None:
    """Draw the chart's series on the axes."""
    drawn = [series for series in chart.series if any(series.key in row for row in rows)]
    if chart.kind != "line":
        drawn = [series for series in drawn if any(row.get(series.key) for row in rows)]  # a band of zeros is only a legend entry
    if chart.kind == "line":
        for series in drawn:
            _line(axes, series, rows, chart.divisor, chart.smooth)
    else:
        _areas(axes, drawn, rows, as_share=chart.kind == "share")
    _finish(axes, chart.unit, legend=len(drawn) > 1)
    axes.set_xlim(rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5)
    if chart.whole and axes.get_ylim()[1] > 0:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    if chart.kind == "share":
        axes.set_ylim(0, 1)


def _line(axes: Axes, series: Series, rows: list[dict], divisor: float = 1.0, smooth: bool = True) -> None:
    """One curve over the rows that have the metric."""
    points = [(row["step"], row[series.key] / divisor) for row in rows if series.key in row]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    label = _plain(series.label)
    if smooth and len(points) > 80:
        width = len(points) // 25
        axes.plot(steps, values, color=series.colour, linewidth=0.8, alpha=0.3)
        values = [sum(window) / len(window) for i in range(len(values)) if (window := values[max(0, i - width) : i + width + 1])]
        axes.plot(steps, values, color=series.colour, linestyle=series.line, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=series.colour, linestyle=series.line, linewidth=1.8, marker="o" if len(points) <= 40 else None,
                  markersize=3.2, label=label)  # fmt: skip


def _areas(axes: Axes, drawn: list[Series], rows: list[dict], as_share: bool) -> None:
    """Stacked steps, one band a series, each row as wide as the distance to the next."""
    rows = [row for row in rows if any(series.key in row for series in drawn)]
    columns = [[row.get(series.key, 0.0) for series in drawn] for row in rows]
    if as_share:
        columns = [[value / (sum(column) or 1.0) for value in column] for column in columns]
    steps = [row["step"] for row in rows]
    width = min((b - a for a, b in pairwise(steps)), default=1) or 1
    floor = [0.0] * len(rows)
    for i, series in enumerate(drawn):
        top = [low + column[i] for low, column in zip(floor, columns, strict=True)]
        edges = [step - width / 2 for step in steps] + [steps[-1] + width / 2]
        axes.fill_between(
            edges, [*floor, floor[-1]], [*top, top[-1]], step="post", color=series.colour, linewidth=0, label=_plain(series.label)
        )
        floor = top
    axes.set_ylim(bottom=0)


def _finish(axes: Axes, unit: str, legend: bool) -> None:
    """Axis formats and the legend."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, unit)))
    axes.tick_params(length=0)
    if legend:
        longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=max(1, min(5, 75 // (longest + 6))), handlelength=2.2,
                    columnspacing=1.4, labelcolor="#59616a")  # fmt: skip


def _tick(value: float, unit: str) -> str:
    """A number on the axis, with its unit."""
    value = value * 100 if unit == "%" else value
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".strip() if math.isfinite(value) else ""


def _plain(label: str) -> str:
    """A label that matplotlib takes literally: no formula, and no leading underscore, which would hide it."""
    return label.replace("$", r"\$").lstrip("_")

"""Validation and entropy against sampled tokens, the mean over the seeds with their range, as one PNG."""

from pathlib import Path

import numpy as np
from arms import ABLATIONS, ENTROPY, GREEDY, OBJECTIVES, SAMPLED, STRONG, Run
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_nft.charts import PALETTE, STYLE

POINTS = 60  # of the common axis of tokens


def draw(runs: list[Run], out: Path) -> None:
    """The objectives from the weak base: greedy, avg@4, entropy; the same from the strong one; the ablations of NFT: avg@4."""

    def ablation(word: str, default: str) -> dict[str, str]:
        return {"NFT": f"{word} {default}", **{name: name for name in ABLATIONS if name.startswith(word)}}

    plain, strong = {name: name for name in OBJECTIVES}, {STRONG(name): name for name in OBJECTIVES}
    panels = [
        ("held out, greedy", GREEDY, plain), ("held out, avg@4 at temperature 1", SAMPLED, plain),
        ("entropy in training, nats a token", ENTROPY, plain), ("strong base: greedy", GREEDY, strong),
        ("strong base: avg@4", SAMPLED, strong), ("strong base: entropy", ENTROPY, strong), ("eps, avg@4", SAMPLED, ablation("eps", "1.0")),
        ("normalize, avg@4", SAMPLED, ablation("normalize", "1")), ("neg_weight, avg@4", SAMPLED, ablation("neg_weight", "1.0")),
    ]  # fmt: skip
    there = {run.name for run in runs}
    panels = [panel for panel in panels if len(there & panel[2].keys()) > 1]
    with rc_context(STYLE):
        rows = -(-len(panels) // 3)
        figure = Figure(figsize=(13, 3.9 * rows), layout="constrained")
        for axes, (title, key, names) in zip(figure.subplots(rows, 3, squeeze=False).flat, panels, strict=False):
            axes.set_title(title, loc="left", fontsize=11)
            for (name, label), colour in zip(names.items(), PALETTE, strict=False):
                _curve(axes, [run for run in runs if run.name == name], key, label, colour)
            _finish(axes, percent=key != ENTROPY, bottom=None if "strong" in title else 0)
        for axes in figure.axes[len(panels) :]:
            axes.set_visible(False)
        figure.savefig(out, dpi=110, format="png")


def _curve(axes: Axes, runs: list[Run], key: str, label: str, colour: str) -> None:
    """The mean over the runs on a common axis, and a band from the lowest to the highest."""
    if not runs:
        return
    tracks = [[(row["sampled"] / 1000, row[key]) for row in run.rows() if key in row] for run in runs]
    tokens = np.linspace(max(track[0][0] for track in tracks), min(track[-1][0] for track in tracks), POINTS)
    values = np.array([np.interp(tokens, *zip(*track, strict=True)) for track in tracks])
    axes.plot(tokens, values.mean(0), color=colour, linewidth=1.8, label=label)
    if len(runs) > 1:
        axes.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)


def _finish(axes: Axes, percent: bool, bottom: float | None) -> None:
    axes.set_xlabel("thousand sampled tokens")
    axes.set_ylim(bottom=bottom)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.legend(loc="best")

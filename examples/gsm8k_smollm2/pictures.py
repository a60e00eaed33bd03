"""The pictures: training of the arms against sampled tokens, and the test accuracies with their intervals."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_nft.charts import BLUE, ORANGE, PALETTE, STYLE, finish_token_axes, token_curve

# title, key of metrics.jsonl, whether it is a share
PANELS = (
    ("held-out problems, greedy", "validation/heldout/greedy", True),
    ("right answers in training", "train/correct_rate", True),
    ("groups with right and wrong answers", "train/mixed_share", True),
    ("entropy, nats a token", "train/entropy", False),
    ("tokens of an answer", "train/response_length", False),
    ("mean |log-prob difference|, trainer and sampler", "train/logprob_difference", False),
)


def draw(arms: dict[str, list[dict]], out: Path) -> None:
    """A panel for each metric, a colour for each arm. arms: title -> rows with `sampled`."""
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7.4), layout="constrained")
        for axes, (title, key, share) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            axes.set_title(title, loc="left", fontsize=11)
            for (name, rows), colour in zip(arms.items(), PALETTE, strict=False):
                token_curve(axes, [rows], key, name, colour)
            finish_token_axes(axes, percent=share, bottom=0)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format="png")


def draw_accuracy(rows: list[dict], out: Path) -> None:
    """Greedy and avg@8 of every model side by side, with 95 % intervals. rows: of summary.json."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for offset, kind, label, colour in ((-0.2, "greedy", "greedy", BLUE), (0.2, "avg@8", "avg@8 at temperature 1", ORANGE)):
            bars = [(number + offset, row[kind], *row[f"{kind}_interval"]) for number, row in enumerate(rows) if kind in row]
            for place, value, low, high in bars:
                axes.bar(place, value, width=0.38, color=colour, label=label if place == bars[0][0] else None)
                axes.vlines(place, low, high, color="#3c4248", linewidth=1)
        axes.set_xticks(range(len(rows)), [row["title"].replace(", ", ",\n") for row in rows])
        axes.set_xlim(-0.6, max(len(rows), 1) - 0.4)
        axes.set_title("GSM8K test problems", loc="left", fontsize=11)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        if rows:
            axes.legend(loc="upper left", ncols=2)
            axes.set_ylim(top=1.15 * max(max(row[key][1] for key in row if key.endswith("_interval")) for row in rows) or 1)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format="png")

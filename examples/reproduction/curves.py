"""Validation and entropy against sampled tokens, the mean over the seeds with their range, as one PNG."""

from pathlib import Path

from arms import ABLATIONS, ENTROPY, GREEDY, OBJECTIVES, SAMPLED, STRONG, Run
from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_nft.charts import PALETTE, STYLE, finish_token_axes, token_curve


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
                token_curve(axes, [run.rows() for run in runs if run.name == name], key, label, colour)
            finish_token_axes(axes, percent=key != ENTROPY, bottom=None if "strong" in title else 0)
        for axes in figure.axes[len(panels) :]:
            axes.set_visible(False)
        figure.savefig(out, dpi=110, format="png")

"""A plan as a picture (PNG) and as a page (HTML) that needs nothing outside it: stacked bars of memory and of time by phase."""

import io
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_nft import charts
from megatron_nft.files import write_whole
from megatron_nft.planner import tables
from megatron_nft.planner.plan import GIB, Plan

SEEN = 0.002  # of a step: what takes less is no bar of its own
Bars = dict[str, dict[str, float]]  # bar: part: height


def write(plan: Plan, directory: str | Path) -> list[Path]:
    """Write plan.json, plan.png and plan.html into a directory, which is made; the files."""
    directory = Path(directory)
    files = [write_whole(directory / "plan.json", json.dumps(plan.as_dict(), indent=2) + "\n")]
    png = directory / "plan.png"
    with rc_context(charts.STYLE):
        _figure(plan).savefig(png, dpi=150, format="png", metadata={"Software": None})
    return [*files, png, write_whole(directory / "plan.html", page(plan))]


def page(plan: Plan) -> str:
    """The HTML page."""
    environment = Environment(loader=PackageLoader("megatron_nft.planner", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("plan.html.jinja").render(
        plan=plan,
        layout=tables.layout_name(plan),
        label=tables.LABEL,
        pictures=[Markup(_svg(plan, which)) for which in ("memory", "time")],
        blocks=[tables.head(plan), tables.aligned(tables.memory_table(plan)), tables.capacity(plan),
                tables.aligned(tables.times_table(plan)), tables.rates(plan), tables.saves(plan)],
        verdict=tables.verdict(plan),
    )  # fmt: skip


def _figure(plan: Plan) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    memory, time = figure.subplots(1, 2)
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    figure.suptitle(f"{tables.LABEL}: {_short_name(plan)}\n{tables.rates_from(plan)}", fontsize=11)
    return figure


def _svg(plan: Plan, which: str) -> str:
    with rc_context({**charts.STYLE, "svg.hashsalt": which}):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        (_draw_memory if which == "memory" else _draw_time)(figure.subplots(), plan)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    return charts.embedded(buffer.getvalue())


def _short_name(plan: Plan) -> str:
    cluster = plan.cluster
    name = Path(plan.config.model.path).name
    return f"{name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, {tables.layout_name(plan)}"


def _draw_memory(axes: Axes, plan: Plan) -> None:
    """A bar for each phase, and the GPU's limit."""
    phases = dict(plan.memory.phases) | ({"servers": plan.memory.servers} if plan.memory.servers else {})
    _stacked(axes, {phase: {part: nbytes / GIB for part, nbytes in parts.items()} for phase, parts in phases.items()})
    axes.axhline(plan.memory.limit / GIB, color=charts.RED, linewidth=1.4, linestyle="--")
    text = f"{plan.memory.limit / GIB:.0f} GiB can be used"
    axes.annotate(
        text, (1, plan.memory.limit / GIB), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=charts.RED, fontsize=8
    )
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.1 * plan.memory.limit / GIB))
    axes.set_title("GiB of the fullest GPU, by phase", fontsize=10)


def _draw_time(axes: Axes, plan: Plan) -> None:
    """A bar for each phase that takes a noticeable time."""
    spent = plan.times
    bars = {
        phase: dict(spent.parts.get(phase) or {phase: seconds}) for phase, seconds in spent.phases.items() if seconds > SEEN * spent.step
    }
    _stacked(axes, bars)
    axes.set_title(f"seconds of a rollout step, {spent.step:.0f} in all", fontsize=10)


def _stacked(axes: Axes, bars: Bars) -> None:
    """One bar beside the other; a part has one colour in all of them."""
    highest = {part: max(own.get(part, 0.0) for own in bars.values()) for own in bars.values() for part in own}
    parts = sorted((part for part, height in highest.items() if height > 0), key=lambda part: -highest[part])  # the plain colours first
    names, floor = list(bars), [0.0] * len(bars)
    for number, part in enumerate(parts):
        heights = [max(bars[name].get(part, 0.0), 0.0) for name in names]
        again = {"hatch": "//", "edgecolor": "white", "linewidth": 0} if number >= len(charts.PALETTE) else {}
        axes.bar(
            range(len(names)), heights, bottom=floor, width=0.66, color=charts.PALETTE[number % len(charts.PALETTE)], label=part, **again
        )
        floor = [low + height for low, height in zip(floor, heights)]
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=9)
    axes.tick_params(length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.08 * max([*floor, axes.get_ylim()[1] / 1.08]) or 1)
    if parts:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, handlelength=1.0, fontsize=8, columnspacing=1.2)

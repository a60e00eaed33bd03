"""The results of an evaluation as plain text, as markdown, and as the rows of the report's page. Numbers are per cent."""

from megatron_nft.trajectories import OUTCOMES

METHOD = (
    "avg@k: mean over problems of the share of right answers among k; pass@j: chance that one of j answers is right, estimated without "
    "bias from the k; maj@k: the answer that most of the k gave, ties shared; greedy: one answer at temperature 0. Brackets: 95 % "
    "intervals, by resampling problems (2,000 times; for greedy Wilson's)."
)


def columns(summary: dict) -> list[str]:
    """What there is of these results: greedy, and the sampled kinds without their k, which stands in the row."""
    keys = {key for result in summary["sets"].values() for key in result}
    own = {"greedy": "greedy", "avg": "avg@k", "pass": "pass@k", "maj": "maj@k"}
    return [name for kind, name in own.items() if any(key.partition("@")[0] == kind for key in keys)]


def header(summary: dict) -> list[str]:
    """Above `rows`."""
    kinds = ["greedy (T 0)" if kind == "greedy" else kind for kind in columns(summary)]
    return ["set", "problems", "k", "T", "top_p", *kinds, "tokens", "cut off", "no answer"]


def rows(summary: dict) -> list[list[str]]:
    """A row for each set, and one for their mean, with what the answers were sampled at beside every number."""
    found = [_row(name, result, columns(summary)) for name, result in summary["sets"].items()]
    if summary.get("mean"):
        found.append(_mean_row(summary, columns(summary)))
    return found


def _row(name: str, result: dict, kinds: list[str]) -> list[str]:
    settings = result["settings"]
    k = settings["k"]
    keys = [kind if kind == "greedy" else f"{kind.partition('@')[0]}@{k}" for kind in kinds]
    cells = [percent(result[key], result[f"{key}_interval"]) if key in result else "" for key in keys]
    sampled = [str(k), f"{settings['temperature']:g}", f"{settings['top_p']:g}"] if k else ["0", "0", ""]
    dropped = sum(result.get("dropped", {}).values())
    problems = f"{result['problems']}{f' (dropped: {dropped})' if dropped else ''}"
    shares = [percent(result["truncated_share"]), percent(result["no_answer_share"])]
    return [name, problems, *sampled, *cells, f"{result['response_length']:.0f}", *shares]


def _mean_row(summary: dict, kinds: list[str]) -> list[str]:
    sets, mean = summary["sets"].values(), summary["mean"]
    shared = [{f"{result['settings'][key]:g}" for result in sets if result["settings"]["k"]} for key in ("k", "temperature", "top_p")]
    sampled = [", ".join(sorted(values, key=float)) for values in shared]
    cells = {name: percent(mean[kind]["value"], mean[kind]["interval"]) for kind, name in (("greedy", "greedy"), ("avg", "avg@k"))
             if kind in mean}  # fmt: skip
    problems = sum(result["problems"] for result in sets)
    return [f"mean of {len(sets)} sets", str(problems), *sampled, *(cells.get(kind, "") for kind in kinds), "", "", ""]


def plain(summary: dict) -> str:
    """A table for a terminal or a log."""
    return aligned([header(summary), *rows(summary)])


def aligned(table: list[list[str]]) -> str:
    """Columns side by side."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)


def markdown(name: str, summary: dict) -> str:
    """The whole result as a page of markdown."""
    passes = [pass_header(summary), *pass_rows(summary)]
    parts = [f"# {name}", f"Model {summary['label']}; seed {summary['seed']}.", markdown_table([header(summary), *rows(summary)]), METHOD]
    parts += ["## pass@j", markdown_table(passes)] if len(passes) > 1 else []
    return "\n\n".join([*parts, "## Answers", markdown_table([ANSWERS_HEADER, *answer_rows(summary)])])


def markdown_table(table: list[list[str]]) -> str:
    """The first row is the header."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in table]
    cells.insert(1, ["---"] * len(table[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def pass_header(summary: dict) -> list[str]:
    """Above `pass_rows`."""
    return ["set", "T", "top_p", *(f"pass@{j}" for j in _js(summary))]


def pass_rows(summary: dict) -> list[list[str]]:
    """pass@j of each set that has sampled answers, for all j."""
    return [
        [name, f"{result['settings']['temperature']:g}", f"{result['settings']['top_p']:g}",
         *(percent(result[f"pass@{j}"], result[f"pass@{j}_interval"]) if f"pass@{j}" in result else "" for j in _js(summary))]
        for name, result in summary["sets"].items() if result["settings"]["k"]
    ]  # fmt: skip


ANSWERS_HEADER = ["set", "verdicts by", "max tokens", "tokens, right", "tokens, not right", *(one.replace("_", " ") for one in OUTCOMES)]


def answer_rows(summary: dict) -> list[list[str]]:
    """How long answers are, and how they were judged."""
    return [
        [name, result["settings"]["reward"], str(result["settings"]["max_tokens"]), _tokens(result["response_length_right"]),
         _tokens(result["response_length_wrong"]), *(f"{result['outcomes'][outcome]:,}" for outcome in OUTCOMES)]
        for name, result in summary["sets"].items()
    ]  # fmt: skip


def _js(summary: dict) -> list[int]:
    keys = {key for result in summary["sets"].values() for key in result if key.startswith("pass@") and not key.endswith("_interval")}
    return sorted(int(key.partition("@")[2]) for key in keys)


def _tokens(length: float | None) -> str:
    return "" if length is None else f"{length:.0f}"


def percent(value: float, interval: tuple[float, float] | list[float] | None = None) -> str:
    """45.2 [40.1, 50.3]"""
    return f"{100 * value:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")

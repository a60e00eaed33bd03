"""From complete runs to the table, the curves, and what of the paper's findings holds in them.

python examples/reproduction/summary.py [--out RUNS_DIR]    what there is now, without training anything
"""

import argparse
import statistics
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

import findings
from arms import ARMS, ENTROPY, GREEDY, SAMPLED, SEEDS, Run
from curves import draw
from jinja2 import Environment, FileSystemLoader

from megatron_nft.evaluation.tables import markdown_table

HERE = Path(__file__).parent
LAST = 2  # validations at the end whose mean is the result: one alone has an error of two points
EDGE = 3  # rollout steps at either end that the entropy is averaged over


@dataclass(frozen=True)
class Result:
    """One run at its end."""

    greedy: float  # 0..1, mean of the last validations
    sampled: float  # avg@4 at temperature 1, likewise
    entropy: float  # change of the entropy over the run, relative to its start
    tokens: int  # sampled in all
    updates: int


def result(run: Run) -> Result:
    rows = run.rows()
    entropies = [row[ENTROPY] for row in rows if ENTROPY in row]
    start, end = statistics.mean(entropies[:EDGE]), statistics.mean(entropies[-EDGE:])
    updates = sum(row.get("train/updates", 0) for row in rows)
    return Result(_last(rows, GREEDY), _last(rows, SAMPLED), end / start - 1, rows[-1]["sampled"], updates)


def _last(rows: list[dict], key: str) -> float:
    return statistics.mean([row[key] for row in rows if key in row][-LAST:])


def write(runs: list[Run], out: Path, docs: Path) -> None:
    """Write reproduction.md and reproduction.png to `docs`, report.html to `out`; print the table and the findings."""
    complete = [run for run in runs if run.complete]
    results: dict[str, dict[int, Result]] = {}
    for run in complete:
        results.setdefault(run.name, {})[run.seed] = result(run)
    if not results:
        raise SystemExit(f"no run below {out} is complete: run examples/reproduction/reproduce.py")
    picture = docs / "reproduction.png"
    draw(complete, picture)
    starts: dict[str, list[dict]] = {}
    for run in complete:
        starts.setdefault(run.base, []).append(run.rows()[0])
    bases = {base: {key: statistics.mean(row[key] for row in rows) for key in (GREEDY, SAMPLED)} for base, rows in starts.items()}
    problems = sum(1 for _ in (HERE.parent / "arithmetic" / "heldout.jsonl").open())
    parts = {
        "table": table(results, bases),
        "findings": findings.findings(results),
        "tokens": round(statistics.mean(r.tokens for of in results.values() for r in of.values()) / 1000) * 1000,
        "updates": round(statistics.mean(r.updates for of in results.values() for r in of.values())),
        "problems": problems,
    }
    environment = Environment(loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = environment.get_template("reproduction.md.jinja").render(**parts)
    (docs / "reproduction.md").write_text(text, encoding="utf-8")
    image = b64encode(picture.read_bytes()).decode()
    page = environment.get_template("report.html.jinja").render(**parts, image=image, runs=complete, out=out)
    (out / "report.html").write_text(page, encoding="utf-8")
    findings_told = ["- " + line for line in parts["findings"]]
    print(markdown_table(parts["table"]), "", *findings_told, "", docs / "reproduction.md", picture, out / "report.html", sep="\n")


def table(results: dict[str, dict[int, Result]], bases: dict[str, dict]) -> list[list[str]]:
    """Header and rows: mean and, over the seeds, standard deviation, in per cent. bases: their accuracies."""
    rows = [["arm", "seeds", "greedy", "avg@4", "entropy, change", "updates"]]
    rows += [[f"{name} base", "", f"{row[GREEDY]:.1%}", f"{row[SAMPLED]:.1%}", "", ""] for name, row in sorted(bases.items(), reverse=True)]
    for name in ARMS:
        if name in results:
            of = list(results[name].values())
            cells = [_spread([100 * getattr(one, key) for one in of]) for key in ("greedy", "sampled", "entropy")]
            rows.append([name, str(len(of)), *cells, f"{statistics.mean(one.updates for one in of):.0f}"])
    return rows


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "reproduction")
    out = parser.parse_args().out.absolute()
    ours = HERE.parents[1] / "runs" / "reproduction"
    write(
        [Run(name, seed, out) for name in ARMS for seed in SEEDS],
        out,
        HERE.parents[1] / "docs" if out == ours else out,
    )


if __name__ == "__main__":
    main()

"""What is worth keeping of the stages that are done, in a few small files: numbers, curves, sample answers.

| file | holds |
|---|---|
| summary.json | device, date, versions, command; of each arm tokens, minutes, accuracies with intervals, and against the warm start |
| arms.md | the same as a table, and the first few sample answers |
| metrics.jsonl | every row of every run's metrics.jsonl, with `run` |
| evaluations.json | every evaluation of the test problems, problem by problem |
| answers.jsonl | greedy answers to a dozen test problems, of every evaluation: before and after |
| curves.png, accuracy.png | training against sampled tokens; test accuracy of every evaluation |
| logs.txt | the end of each stage's log |
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import pictures
from stages import ARMS, BEFORE, ROOT, WARM_START, Plan

from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation.compare import compare
from megatron_nft.evaluation.tables import markdown_table, percent
from megatron_nft.files import write_whole
from megatron_nft.logbook import METRICS
from megatron_nft.preflight.nodes import versions
from megatron_nft.report import load_rows, with_sampled

SET, SAMPLED = "gsm8k", "avg@8"
TITLES = {BEFORE: "the model itself", WARM_START: "warm start", "nft": "NFT", "rft": "RFT", "dapo": "DAPO", "nft_fp8": "NFT, FP8 training"}
PROBLEMS = 12  # whose answers are kept, spread over the test set
SHOWN = 4  # of these problems in arms.md
LOG_LINES = 40
HEADER = ["", "sampled tokens", "updates", "greedy", SAMPLED, f"{SAMPLED} - warm start's", "p", "minutes"]
_ASK_GPUS = "import json; from megatron_nft.policy.devices import gpu_names; print('\\n' + json.dumps(gpu_names()))"


def machine() -> dict:
    """GPUs by name, the CPU otherwise, and versions. Asked for in a process of its own: one that has asked holds memory of the GPU."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    asked = subprocess.run([sys.executable, "-c", _ASK_GPUS], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if asked.returncode:
        raise SystemExit(f"run.py: the GPUs cannot be asked for their names:\n{asked.stderr[-2000:]}")
    gpus = json.loads(asked.stdout.strip().splitlines()[-1])
    device = gpus[0] if gpus else f"CPU, {platform.machine()}, {len(os.sched_getaffinity(0))} cores; no GPU"
    return {"gpus": gpus, "device": device, "versions": versions()}


def write(plan: Plan, stages: dict, of_machine: dict, out: Path, command: str) -> None:
    """Write all files anew. stages: as run.Record has them; command: the one that was given."""
    found = evaluations(plan)
    runs = {name: with_sampled(load_rows(plan.runs / name)) for name in ("sft", *plan.arms) if _has_rows(plan.runs / name)}
    arms = {name: rows for name, rows in runs.items() if name != "sft" and stages.get(name, {}).get("done")}
    summary = {
        "benchmark": "gsm8k_smollm2",
        "device": of_machine["device"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {name: version for name, version in of_machine["versions"].items() if version},
        "command": command,
        "sizes": "--tiny: shows that it runs, and nothing else" if plan.tiny else "as configured",
        "settings": list(plan.settings),
        "seconds": {name: round(one["seconds"], 1) for name, one in stages.items()},
        "rows": [_row(name, plan, arms, stages, found) for name in TITLES if name in found],
        "ratios": [],
    }
    _write(out / "summary.json", json.dumps(summary, indent=1))
    samples = sample_answers(plan, found)
    _write(out / "arms.md", markdown(summary, samples))
    _write_lines(out / METRICS, ({"run": name, **row} for name, rows in runs.items() for row in rows))
    _write(out / "evaluations.json", json.dumps(found))
    _write_lines(out / "answers.jsonl", samples)
    _write(out / "logs.txt", logs(plan.runs / "logs"))
    pictures.draw({TITLES[name]: rows for name, rows in arms.items()}, out / "curves.png")
    pictures.draw_accuracy(summary["rows"], out / "accuracy.png")


def evaluations(plan: Plan) -> dict[str, dict]:
    """The evaluations that are whole, by name."""
    files = {name: _evaluation(plan, name) for name in (BEFORE, WARM_START, *ARMS)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def _evaluation(plan: Plan, name: str) -> Path:
    return plan.runs / "scores" / "evaluations" / f"{name}.json"


def _row(name: str, plan: Plan, arms: dict[str, list[dict]], stages: dict, found: dict[str, dict]) -> dict:
    """A row of the summary, and of the table."""
    result, rows = found[name]["sets"][SET], arms.get(name, [])
    row = {"name": name, "title": TITLES[name], "problems": result["problems"]}
    row |= {key: result[key] for kind in ("greedy", SAMPLED) if kind in result for key in (kind, f"{kind}_interval")}
    row |= {key: result[key] for key in ("response_length", "truncated_share", "no_answer_share")}
    if name == WARM_START and "sft" in stages:
        row["minutes"] = stages["sft"]["seconds"] / 60
    if rows:
        updates = sum(one.get("train/updates", 0) for one in rows)
        row |= {
            "sampled_tokens": rows[-1]["sampled"],
            "updates": updates,
            "steps": rows[-1]["step"],
            "minutes": stages[name]["seconds"] / 60,
        }
    if WARM_START in found and name not in (BEFORE, WARM_START):
        against = compare(_evaluation(plan, WARM_START), _evaluation(plan, name))
        one = next(one for one in against.differences if one.kind == SAMPLED)
        row |= {"difference": one.difference, "difference_interval": one.interval, "p": one.p}
    return row


def markdown(summary: dict, samples: list[dict]) -> str:
    """The fragment: what was run and on what, the table, and answers. A percentage is followed by its 95 % interval."""
    where = summary["device"] if summary["sizes"] == "as configured" else f"{summary['device']}, sizes of --tiny: no result"
    told = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [
        f"## GSM8K with SmolLM2-135M-Instruct: {where}",
        f"{summary['date']}; {told}. In per cent of {summary['rows'][0]['problems'] if summary['rows'] else 0} test problems, with 95 % "
        f"intervals by resampling problems (greedy: Wilson's); p by paired bootstrap. Minutes of the training alone, start included.",
        f"`{summary['command']}`",
        markdown_table([HEADER, *map(_cells, summary["rows"])]),
        *_spoken(samples),
    ]
    return "\n\n".join(lines) + "\n"


def _spoken(samples: list[dict]) -> Iterator[str]:
    """The answers to the first problems of the samples, which are not chosen by what was answered."""
    for number, (_, rows) in enumerate(groupby(samples, key=lambda row: row["id"])):
        if number == SHOWN:
            return
        of = list(rows)
        answers = [f"- {TITLES[row['model']]}, {row['outcome'].replace('_', ' ')}: {_on_one_line(row['response'])}" for row in of]
        yield "\n".join([f"{of[0]['id']}: {_on_one_line(of[0]['question'])} ({of[0]['gold']})", "", *answers])


def _on_one_line(text: str) -> str:
    """A text as code, so that nothing in it is taken for markdown."""
    return f"`{' / '.join(text.replace('`', chr(39)).split(chr(10))).strip()}`"


def _cells(row: dict) -> list[str]:
    low, high = row.get("difference_interval", (0.0, 0.0))
    difference = f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" if "difference" in row else ""
    return [
        row["title"],
        f"{row['sampled_tokens']:,}" if "sampled_tokens" in row else "",
        f"{row['updates']:.0f}" if "updates" in row else "",
        *(percent(row[kind], row[f"{kind}_interval"]) if kind in row else "" for kind in ("greedy", SAMPLED)),
        difference,
        f"{row['p']:.4f}" if "p" in row else "",
        f"{row['minutes']:.1f}" if "minutes" in row else "",
    ]


def sample_answers(plan: Plan, found: dict[str, dict]) -> list[dict]:
    """Greedy answers to the same problems by every model that was evaluated, problem by problem, in the order of the models."""
    made: list[dict] = []
    for name in found:
        files = kept.files(kept.directory_of(plan.runs / "scores", name))
        rows = [row for file in files for row in kept.read(file) if row["kind"] == "greedy"]
        rows = {row["position"]: row for row in rows}
        for position in sorted(rows)[:: max(1, len(rows) // PROBLEMS)][:PROBLEMS]:
            row = rows[position]
            of = {"model": name, "question": row["question"], "gold": row["answer"], "response": row["response"]}
            made.append({"id": row["prompt_id"], **of, "outcome": row["outcome"], "found": row["found"], "length": row["length"]})
    return sorted(made, key=lambda row: int(row["id"].rpartition("-")[2]))


def logs(folder: Path) -> str:
    """The last lines of every log."""
    parts = []
    for file in sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime):
        parts += [f"==== {file.name}", *file.read_text(errors="replace").splitlines()[-LOG_LINES:]]
    return "\n".join(parts)


def _has_rows(run_dir: Path) -> bool:
    path = run_dir / METRICS
    return path.is_file() and path.stat().st_size > 0


def _write(path: Path, text: str) -> None:
    write_whole(path, text.rstrip() + "\n")


def _write_lines(path: Path, rows) -> None:
    _write(path, "\n".join(json.dumps(row) for row in rows))

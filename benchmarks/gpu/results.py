"""docs/gpu-results.md from the results in a folder; or, with --ratios, their ratios as a table on the terminal.

    python benchmarks/gpu/results.py FOLDER [--output docs/gpu-results.md] [--any-device] [--ratios]

Takes from the folder and those within it every result in the form of common.py (the benchmarks', tests/gpu's test_gpu.json), every
fragment *.md beside a summary.json that tells its device, and every *.png beside one, which is copied next to the page. A result that was
not measured on a GPU is refused unless --any-device is given.
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_nft.errors import UserError, first_line  # noqa: E402
from megatron_nft.evaluation.tables import markdown_table  # noqa: E402

SUMMARY = "summary.json"  # beside a fragment: what it was measured on
COMMANDS = (
    ("make test-gpu PYTHON=python3", "that precisions, offload, resume and the engine compute what they should, by stated tolerances"),
    ("python examples/gsm8k_smollm2/run.py", "what NFT, RFT and DAPO make of a real model, with as many sampled tokens each"),
    ("python benchmarks/gpu/logprobs.py", "whether log-probs at a vocabulary of 152,064 take a tenth of the memory and no more time"),
    ("python benchmarks/gpu/weight_stream.py", "whether our part of a sync takes at most two plain copies; what sleep and wake cost"),
    ("python benchmarks/gpu/step_shares.py", "what of a rollout step neither generates nor trains"),
    ("python benchmarks/gpu/train_step.py --profile FOLDER", "MFU of a step in BF16, what FP8 gains, and where the time goes"),
    ("python benchmarks/gpu/generation.py", "whether our engine writes as fast as vLLM by itself"),
    ("python benchmarks/gpu/mismatch.py MODEL_DIR", "how far trainer and engine are apart in each precision, and whether any is bit-equal"),
    ("python benchmarks/gpu/efficiency.py", "how far the planner's predictions are from what is measured"),
)  # fmt: skip
ORDER = ("test_gpu", "logprobs", "weight_stream", "step_shares", "train_step", "generation", "mismatch", "efficiency")
FORM = {"benchmark": str, "device": str, "date": str, "versions": dict, "command": str, "rows": list, "ratios": list}  # as common.py has it
Result = dict


def load(folder: Path, any_device: bool) -> tuple[list[tuple[Path, Result]], list[Path], list[Path]]:
    """(results with their files, fragments, pictures). Raises UserError for what no GPU measured, and for what is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "name the one that the results were written to")
    found, fragments, pictures = [], [], []
    for path in sorted(folder.rglob("*.json")):
        result = _read(path)
        if result is None:
            continue
        if not any_device and result["device"].startswith("CPU"):
            raise UserError(f"{path} was measured on {result['device']}", "leave it out of the folder, or give --any-device")
        if path.name == SUMMARY:
            fragments += sorted(path.parent.glob("*.md"))
            pictures += sorted(path.parent.glob("*.png"))
        else:
            found.append((path, result))
    found.sort(key=lambda one: (ORDER.index(one[1]["benchmark"]) if one[1]["benchmark"] in ORDER else len(ORDER), str(one[0])))
    return found, fragments, pictures


def _read(path: Path) -> Result | None:
    """None: JSON of another kind. Raises UserError for a file that is not whole."""
    mend = "bring it again, or leave it out of the folder"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise UserError(f"{path} is damaged ({first_line(error)})", mend) from None
    if not isinstance(result, dict) or not {"device", "rows", "ratios"} <= set(result):
        return None
    if wrong := [name for name, kind in FORM.items() if not isinstance(result.get(name), kind)]:
        raise UserError(f"{path} is no whole result: {wrong[0]} is {result.get(wrong[0], 'missing')!r}", mend)
    return result


def page(results: list[tuple[Path, Result]], fragments: list[Path] = (), pictures: list[str] = ()) -> str:
    """The page; pictures by the names that they have beside it."""
    none = "" if results or fragments else " **No run on a GPU stands in it yet.**"
    told = (
        "This page is written by `python benchmarks/gpu/results.py FOLDER --output docs/gpu-results.md` from the results in a folder, and "
        f"by nothing else: every figure was measured on the device that its heading names.{none} These commands, in this order, make the "
        "results; `PYTHON=python3 bash benchmarks/gpu/run_all.sh FOLDER` runs the benchmarks among them in ten minutes."
    )
    lines = [
        "# Measured on a GPU",
        textwrap.fill(told, 140, break_on_hyphens=False),
        markdown_table([["command", "what it proves"], *([f"`{command}`", proves] for command, proves in COMMANDS)]),
    ]
    lines += [path.read_text(encoding="utf-8").strip() for path in fragments]
    lines += [f"![{name}]({name})" for name in pictures]
    lines += [section(path, result) for path, result in results]
    return "\n\n".join(lines) + "\n"


def section(path: Path, result: Result) -> str:
    """Of one file."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"## {result['benchmark']}: {result['device']}", f"{path.name}, {result['date']}; {versions}.", f"`{result['command']}`"]
    if result["ratios"]:
        told = {None: "", True: "yes", False: "**no**"}
        cells = [[r["name"], spelt(r["value"]), r["goal"] or "", told[r["met"]]] for r in result["ratios"]]
        parts.append(markdown_table([["ratio", "value", "goal", "met"], *cells]))
    if result["rows"]:
        parts.append(rows_table([flat(row) for row in result["rows"]]))
    parts += [profile_table(name, found) for name, found in result.get("profiles", {}).items()]
    return "\n\n".join(parts)


def flat(row: dict) -> dict:
    """A row whose values are no containers: of a dictionary each entry, of a list nothing."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}: {key}": inner for key, inner in value.items() if not isinstance(inner, dict | list)}
        elif not isinstance(value, list):
            found[name] = value
    return found


def rows_table(rows: list[dict]) -> str:
    """Rows as a table; what is the same in all of several stands above it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = [name for name in names if len(rows) > 1 and all(name in row and row[name] == rows[0][name] for row in rows)]
    shown = [name for name in names if name not in same]
    table = markdown_table([shown, *([spelt(row.get(name)) for name in shown] for row in rows)])
    return (f"In all rows: {', '.join(f'{name} {spelt(rows[0][name])}' for name in same)}.\n\n" if same else "") + table


def profile_table(name: str, found: dict) -> str:
    """Where the time of a profiled step went."""
    span = found["span_seconds"]
    rows = [[kind, f"{seconds * 1e3:.1f}", f"{seconds / span:.1%}" if span else ""] for kind, seconds in found["kinds"].items()]
    return f"Profile of {name}: {span * 1e3:.1f} ms.\n\n" + markdown_table([["kind", "ms", "share"], *rows])


def spelt(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("\n", " ")


def ratios_table(results: Iterable[tuple[Path, Result]]) -> str:
    """For the terminal: name, value, goal, met."""
    told = {None: "", True: "met", False: "MISSED"}
    lines = [f"{'ratio':<92}{'value':>12}   {'goal':<10}"]
    for _, result in results:
        for r in result["ratios"]:
            value = "none" if r["value"] is None else f"{r['value']:.4g}"
            lines.append(f"{r['name']:<92}{value:>12}   {r['goal'] or '':<10}{told[r['met']]}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu-results.md")
    parser.add_argument("--any-device", action="store_true")
    parser.add_argument("--ratios", action="store_true", help="print them, and write nothing")
    arguments = parser.parse_args()
    results, fragments, pictures = load(arguments.folder, arguments.any_device or arguments.ratios)
    if arguments.ratios:
        print(ratios_table(results))
        return
    names = [f"gpu-{picture.name}" for picture in pictures]
    whole = page(results, fragments, names)
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        for picture, name in zip(pictures, names, strict=True):
            shutil.copyfile(picture, arguments.output.with_name(name))
        arguments.output.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror})", "give --output another place") from None


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"results: {error}", file=sys.stderr)
        sys.exit(2)

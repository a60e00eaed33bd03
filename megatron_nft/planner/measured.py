"""What benchmarks/gpu/efficiency.py measured on a GPU, in place of the published shares. What is not a measurement of the GPU in question
is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_nft.errors import UserError, first_line
from megatron_nft.planner.hardware import PUBLISHED, Gpu

# Figures of an entry, which are fields of hardware.Achieved, and between what they can be: shares of a data sheet's rate (5 % for clocks
# above the nominal one), tokens, seconds
SHARE = (0.0, 1.05)
LIMITS = {
    **dict.fromkeys(("matrix", "matrix_fp8", "attention", "attention_backward", "memory", "decode", "nvlink", "network", "host"), SHARE),
    "half_rate": (0.0, 100_000.0),
    "launch": (0.0, 1e-3),
}
WORDS = ("device", "date", "command")  # of an entry, besides gpu and figures
MEND = "measure again with benchmarks/gpu/efficiency.py --json FILE on the GPU in question, or leave plan.measured out"


def applied(gpu: Gpu, file: str | None) -> Gpu:
    """The GPU with what an entry says it achieves; figures that the entry does not have stay published, and its source says so. None: all
    of them.

    Raises UserError for a file that cannot be read, of another GPU or of a CPU, made with --tiny, or with a figure that cannot be.
    """
    if file is None:
        return gpu
    entry = _read(Path(file))
    if entry["gpu"] is None:
        raise UserError(f"plan.measured {file} was measured on {entry['device']}, which is no GPU that the planner knows", MEND)
    if entry["gpu"] != gpu.name:
        raise UserError(f"plan.measured {file} was measured on {entry['gpu']}, and plan.gpu is {gpu.name}",
                        f"set plan.gpu={entry['gpu']}, or leave plan.measured out")  # fmt: skip
    if entry.get("tiny"):
        raise UserError(f"plan.measured {file} was made with --tiny, which measures nothing", MEND)
    figures = {name: _figure(file, name, value) for name, value in entry["figures"].items() if value is not None}
    if not figures:
        raise UserError(f"plan.measured {file} has no figure", MEND)
    missing = [name for name in LIMITS if name not in figures]
    source = f"measured on {entry['device']} on {entry['date'][:10]}" + (f"; {PUBLISHED}: {', '.join(missing)}" if missing else "")
    return replace(gpu, achieved=replace(gpu.achieved, **figures, source=source))


def _read(file: Path) -> dict[str, Any]:
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"plan.measured {file} cannot be read ({error.strerror})", "give the file of a measurement") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise UserError(f"plan.measured {file} is damaged ({first_line(error)})", MEND) from error
    whole = (
        isinstance(entry, dict)
        and isinstance(entry.get("gpu", 0), str | None)
        and isinstance(entry.get("figures"), dict)
        and all(isinstance(entry.get(name), str) and entry[name] for name in WORDS)
    )
    if not whole:
        raise UserError(f"plan.measured {file} is no measurement: it has not gpu, figures, {', '.join(WORDS)}", MEND)
    return entry


def _figure(file: str, name: str, value: Any) -> float:
    if name not in LIMITS:
        raise UserError(f"plan.measured {file} has a figure {name!r}, which the planner does not know", MEND)
    least, most = LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= most:
        raise UserError(f"plan.measured {file} says that {name} is {value!r}, which cannot be: it is above {least:g}, up to {most:g}", MEND)
    return float(value)

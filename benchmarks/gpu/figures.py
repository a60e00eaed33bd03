"""From measured rows to the planner's figures: each is the value with which the planner's own formula gives the measured seconds."""

from dataclasses import replace
from statistics import median

import common
import numpy as np

from megatron_nft.planner import kernels
from megatron_nft.planner.hardware import Gpu

LEAST_HALF = 1.0  # tokens: a fit may say that short sequences lose nothing
READS = 8  # rows up to which a product of few rows is all reading
ERROR = 0.10  # of the model, of what set none of its figures


def figures(gpu: Gpu, rows: list[dict]) -> dict[str, float | None]:
    """By the names of hardware.Achieved; None: not measured."""
    half, ahead, back = _attention(gpu, rows)
    exchanges = [row for row in rows if row["kind"] == "all-reduce" and row["backend"] == "nccl"]
    near = [row["bandwidth"] / gpu.nvlink for row in exchanges if row["local"] == row["ranks"]]
    far = [row["bandwidth"] / (gpu.network * row["local"]) for row in exchanges if row["local"] < row["ranks"]]
    return {
        "matrix": _share(_of(rows, "product", fp8=False), lambda row: product_seconds(_perfect(gpu), row)),
        "matrix_fp8": _share(_of(rows, "product", fp8=True), lambda row: product_seconds(_perfect(gpu), row)) if gpu.fp8 else None,
        "attention": ahead,
        "attention_backward": back,
        "half_rate": half,
        "memory": _share(_of(rows, "stream"), lambda row: row["bytes"] / gpu.bandwidth),
        "decode": _share([row for row in _of(rows, "few rows") if row["rows"] <= READS], lambda row: row["bytes"] / gpu.bandwidth),
        "nvlink": median(near) if near else None,
        "network": median(far) if far else None,
        "host": _share(_of(rows, "host copy"), lambda row: row["bytes"] / gpu.host),
        "launch": _seconds_each(_of(rows, "launch")),
    }


def _of(rows: list[dict], kind: str, **fields) -> list[dict]:
    """The rows of a kind that were measured."""
    return [row for row in rows if row["kind"] == kind and "seconds" in row and all(row[name] == value for name, value in fields.items())]


def _perfect(gpu: Gpu) -> Gpu:
    """It reaches all of its sheet: the formula then gives the seconds of a share of 1."""
    return replace(gpu, achieved=replace(gpu.achieved, matrix=1.0, matrix_fp8=1.0, attention=1.0, attention_backward=1.0, memory=1.0))


def _share(rows: list[dict], ideal) -> float | None:
    """Of the sheet, over all rows together: longer ones count for more, as they do in a step."""
    return sum(map(ideal, rows)) / sum(row["seconds"] for row in rows) if rows else None


def _seconds_each(rows: list[dict]) -> float | None:
    return sum(row["seconds"] for row in rows) / sum(row["count"] for row in rows) if rows else None


def product_seconds(gpu: Gpu, row: dict) -> float:
    """By the planner."""
    return kernels.matrix_product(gpu, row["rows"], row["columns"], row["depth"], row["fp8"])


def _attention(gpu: Gpu, rows: list[dict]) -> tuple[float | None, float | None, float | None]:
    """(tokens of half the rate, share forward, share backward). seconds x peak / operations = (1 + half / length) / share: a line over
    1 / length, fitted to relative errors, through the forward rows; the backward ones have its half."""
    ahead, back = (_of(rows, "attention", backward=flag) for flag in (False, True))
    if len({row["length"] for row in ahead}) < 2:
        return None, None, None
    full = replace(gpu, achieved=replace(_perfect(gpu).achieved, half_rate=0.0))
    slowness = np.array([row["seconds"] / attention_seconds(full, row) for row in ahead])
    inverse = np.array([1.0 / row["length"] for row in ahead])
    system = np.stack([np.ones_like(inverse), inverse], 1) / slowness[:, None]
    base, slope = np.linalg.lstsq(system, np.ones_like(inverse), rcond=None)[0]
    half = max(float(slope / base), LEAST_HALF) if base > 0 else LEAST_HALF
    curved = replace(gpu, achieved=replace(_perfect(gpu).achieved, half_rate=half))
    back = [row for row in back if row["seconds"] > 0]
    return half, *(_share(own, lambda row: attention_seconds(curved, row)) for own in (ahead, back))


def attention_seconds(gpu: Gpu, row: dict) -> float:
    """By the planner."""
    return kernels.attention(gpu, row["squares"], row["channels"], row["length"], row["backward"])


def ratios(gpu: Gpu, found: dict[str, float | None], rows: list[dict]) -> list[dict]:
    """Each figure beside the published one, and the errors of the planner's formulas with the measured figures."""
    lines = [common.ratio(f"{name}: measured to published", value and value / getattr(gpu.achieved, name)) for name, value in found.items()]
    own = replace(gpu, achieved=replace(gpu.achieved, **{name: value for name, value in found.items() if value is not None}))
    few = lambda row: float(kernels.product_of_few_rows(own, np.array(float(row["rows"])), row["weights"], row["bytes"], False))  # noqa: E731
    for what, kind, model in (
        ("products of the presets", "product", lambda row: product_seconds(own, row)),
        ("small products", "small product", lambda row: product_seconds(own, row)),
        ("attention", "attention", lambda row: attention_seconds(own, row)),
        ("products of few rows", "few rows", few),
    ):
        errors = [abs(model(row) / row["seconds"] - 1) for row in _of(rows, kind) if row["seconds"] > 0]
        lines.append(common.ratio(f"{what}: median error of the planner's formula", median(errors) if errors else None, f"<= {ERROR}"))
    return lines

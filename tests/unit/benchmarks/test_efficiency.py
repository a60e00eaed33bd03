"""What a GPU achieves, from measured rows: rows that the planner's formulas made give back what they were made with."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megatron_nft.errors import UserError
from megatron_nft.planner import kernels
from megatron_nft.planner.hardware import GPUS, Achieved
from megatron_nft.planner.measured import LIMITS, applied
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import figures  # noqa: E402

TRUE = Achieved(0.61, 0.52, 0.58, 0.44, half_rate=1200.0, memory=0.83, decode=0.71, host=0.86, launch=4e-6)
H200 = replace(GPUS["H200"], achieved=TRUE)
PRODUCTS = [(16384, 896, 5120), (16384, 6912, 5120), (5120, 3456, 16384), (128 * 133, 256, 5120)]


def rows(gpu) -> list[dict]:
    """As a GPU would measure them that is just as the planner's formulas have it."""
    made = []
    for m, n, k in PRODUCTS:
        for fp8 in (False, True):
            row = {"kind": "product", "rows": m, "columns": n, "depth": k, "fp8": fp8}
            made.append(row | {"seconds": kernels.matrix_product(gpu, m, n, k, fp8)})
    for length in (1024, 2048, 4096, 16384):
        for backward in (False, True):
            row = {"kind": "attention", "squares": 16384 * length, "channels": 3584, "length": length, "backward": backward}
            made.append(row | {"seconds": kernels.attention(gpu, row["squares"], 3584, length, backward)})
    made += [{"kind": "stream", "bytes": nbytes, "seconds": kernels.moved(gpu, nbytes)} for nbytes in (2**30, 3 * 2**30)]
    for few in (1, 8, 256):
        row = {"kind": "few rows", "rows": few, "weights": 2.8e8, "bytes": 5.6e8}
        made.append(row | {"seconds": float(kernels.product_of_few_rows(gpu, np.array(float(few)), 2.8e8, 5.6e8, False))})
    made.append({"kind": "host copy", "bytes": 2**30, "seconds": 2**30 / (gpu.host * gpu.achieved.host)})
    made.append({"kind": "launch", "count": 1000, "seconds": 1000 * gpu.achieved.launch})
    made.append({"kind": "small product", "rows": 1, "columns": 1, "depth": 1, "fp8": False, "error": "out of memory"})
    return made


def test_figures_give_the_planners_formulas_back_what_was_measured():
    found = figures.figures(GPUS["H200"], rows(H200))
    assert set(found) == set(LIMITS)
    for name in ("matrix", "matrix_fp8", "attention", "attention_backward", "half_rate", "memory", "host", "launch"):
        assert found[name] == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert found["decode"] == pytest.approx(0.71, rel=0.01)  # a few rows compute a little, too
    assert found["nvlink"] is None and found["network"] is None  # one rank


def test_ratios_tell_of_the_formulas_errors():
    lines = {line["name"]: line for line in figures.ratios(GPUS["H200"], figures.figures(GPUS["H200"], rows(H200)), rows(H200))}
    assert lines["matrix: measured to published"]["value"] == pytest.approx(0.61 / 0.66)
    errors = [line for name, line in lines.items() if "error of the planner's formula" in name]
    assert [line["met"] for line in errors] == [True, None, True, True]  # of small products nothing was measured
    slower = [row | {"seconds": row["seconds"] * (1.5 if row.get("length") == 16384 else 1.0)} for row in rows(H200) if "seconds" in row]
    found = figures.figures(GPUS["H200"], slower)
    assert 0 < found["attention"] < 0.58


def test_exchanges_within_a_node_and_beyond():
    one = {"kind": "all-reduce", "backend": "nccl", "ranks": 8, "local": 8, "bytes": 2**28, "bandwidth": 300e9}
    found = figures.figures(GPUS["H200"], [one])
    assert found["nvlink"] == pytest.approx(300 / 450) and found["network"] is None and found["matrix"] is None
    found = figures.figures(GPUS["H200"], [one | {"ranks": 16, "bandwidth": 320e9}])
    assert found["network"] == pytest.approx(320 / (8 * 50)) and found["nvlink"] is None
    assert figures.figures(GPUS["H200"], [one | {"backend": "gloo"}])["nvlink"] is None


def test_a_gpu_without_fp8_has_no_figure_of_it():
    assert figures.figures(GPUS["A100"], rows(H200))["matrix_fp8"] is None


@pytest.mark.slow
def test_the_script_runs_and_the_planner_refuses_what_a_cpu_measured(tmp_path):
    output = tmp_path / "entry.json"
    command = [sys.executable, "benchmarks/gpu/efficiency.py", "--tiny", "--seconds", "200", "--json", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    entry = json.loads(output.read_text())
    assert entry["gpu"] is None and entry["tiny"] and entry["device"].startswith("CPU") and "--tiny" in entry["command"]
    kinds = {row["kind"] for row in entry["rows"] if row.get("seconds")}
    assert kinds == {"product", "small product", "attention", "few rows", "stream", "host copy", "launch"}
    assert {row["fp8"] for row in entry["rows"] if row["kind"] == "product"} == {False, True}
    assert entry["figures"]["matrix"] > 0 and entry["figures"]["nvlink"] is None
    with pytest.raises(UserError, match=r"was measured on CPU .*, which is no GPU that the planner knows"):
        applied(GPUS["H100"], str(output))


def test_the_shapes_are_those_of_the_presets():
    import efficiency

    sizes = efficiency.Sizes.of(GPUS["H200"], tiny=False)
    assert (16384, 27648 * 2 // 8, 5120) in sizes.products["32B, TP8"] and (4096, 3584, 18944) in sizes.products["7B, TP1"]
    assert [rows // 128 for rows, _, _ in sizes.small] == [66, 132, 133, 264, 265]
    assert all(side % 16 == 0 for shapes in sizes.products.values() for shape in shapes for side in shape)  # for FP8

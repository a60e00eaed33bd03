"""The command: what is printed, exit codes, files, and that bad input is refused before torch is imported."""

import json
import subprocess
import sys

import matplotlib.image
import pytest

from megatron_nft import config
from megatron_nft.cli import main
from megatron_nft.planner import command, models, picture, tables
from tests.support import ROOT


def test_prints_tables_and_says_that_they_are_estimates(file, simple, capsys):
    assert main(["plan", str(file), "rollout.tensor_parallel_size=8"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ESTIMATE, not measured: Qwen2.5-32B") and not err
    for text in ("16 nodes x 8 H100 (128 GPUs); TP8 DP16; vLLM TP8, 16 engines", "GiB of the fullest GPU", "longest response that fits",
                 "made of", "tokens/s/GPU", "GPU-hours", "disk of the whole run", "\nfits\n"):  # fmt: skip
        assert text in out


def test_what_does_not_fit_is_one_line_and_the_table_is_there(file, simple, capsys):
    assert main(["plan", str(file), "train.tokens_per_micro_batch=65536"]) == 2
    out, err = capsys.readouterr()
    assert "DOES NOT FIT: train needs" in out
    assert err.startswith("megatron-nft: the config does not fit (estimate): train needs ") and err.count("\n") == 1
    assert "set train." in err or "set optimizer." in err


def test_json_has_the_numbers_of_the_tables(file, simple, capsys):
    assert main(["plan", str(file), "--json", "--with", "parallel.pipeline_model_parallel_size=2 train.steps=10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"] is True and found["fits"] and found["layout"]["tp"] == 8
    assert sum(found["times"]["phases"].values()) == pytest.approx(found["times"]["step"])
    (other,) = found["others"].values()
    assert other["layout"]["pp"] == 2 and other["times"]["days"] < found["times"]["days"]


def test_candidates_side_by_side(file, simple, capsys):
    assert main(["plan", str(file), "--with", "parallel.pipeline_model_parallel_size=2", "--with", "rollout.tensor_parallel_size=2"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("layout"))
    assert row.split()[1:] == ["TP8", "DP16", "TP8", "PP2", "DP8", "TP8", "DP16"]
    assert "(2) rollout.tensor_parallel_size=2" in out


def test_a_candidates_values_may_have_spaces(file, simple, capsys, tmp_path):
    (tmp_path / "a b" / "Qwen2.5-1.5B").mkdir(parents=True)
    (tmp_path / "a b" / "Qwen2.5-1.5B" / "config.json").write_text(json.dumps(models.find("Qwen2.5-1.5B").hf))
    given = f"model.path='{tmp_path}/a b/Qwen2.5-1.5B' parallel.tensor_model_parallel_size=2"
    assert main(["plan", str(file), "rollout.tensor_parallel_size=2", "--with", given]) == 0
    assert f"(1) {given}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, said",
    [
        (["--search", "--top", "0"], "--top is 0"),
        (["--with", "model.path='a"], "quotation mark too few"),
        (["--output", "/proc/nope"], "--output /proc/nope cannot be written"),
    ],
)
def test_bad_options_are_one_line(file, more, said, capsys):
    assert main(["plan", str(file), *more]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_search_prints_overrides(file, simple, capsys, monkeypatch):
    monkeypatch.setattr("megatron_nft.planner.search._powers", lambda most: [1])  # fewer layouts
    assert main(["plan", str(file), "--search", "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "layouts, fastest first" in out and "\n2. " in out and "\n3. " not in out


def test_files(file, simple, tmp_path, capsys):
    assert main(["plan", str(file), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["fits"]
    height, width, _ = matplotlib.image.imread(tmp_path / "out" / "plan.png").shape
    assert width > height > 400
    page = (tmp_path / "out" / "plan.html").read_text()
    assert page.count("<svg") == 2 and "ESTIMATE" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing from outside


def test_bars_are_the_bytes(planned):
    """Heights of a phase's bars add up to its sum, and the line stands at the limit."""
    found = planned()
    axes = picture._figure(found).axes[0]
    tops = {}
    for bar in axes.patches:
        phase = round(bar.get_x() + bar.get_width() / 2)
        tops[phase] = max(tops.get(phase, 0), bar.get_y() + bar.get_height())
    sums = [sum(parts.values()) / 2**30 for parts in found.memory.phases.values()]
    assert [tops[i] for i in range(len(sums))] == pytest.approx(sums)
    assert axes.lines[0].get_ydata()[0] == pytest.approx(found.memory.limit / 2**30)


def test_dry_run_says_how_to_get_a_plan(file, planned):
    assert "plan.nodes=N" in command.short(config.load(file, ["plan.nodes=null"]))
    text, step = command.short(config.load(file)), planned().times.step
    assert text.startswith(tables.LABEL) and f"{step:.0f} s a rollout step" in text and text.endswith("fits")


@pytest.mark.parametrize(
    "override, said", [("plan.gpu=V100", "plan.gpu is 'V100'"), ("model.path=nowhere", "no model directory at nowhere")]
)
def test_refused_before_torch_is_imported(file, override, said):
    code = ("import sys\nfrom megatron_nft.cli import main\n"
            f"code = main(['plan', {str(file)!r}, {override!r}])\nprint(code, 'torch' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "2 False" and said in done.stderr and done.stderr.count("\n") == 1

"""The page of GPU results: what goes into it, and that no figure of a CPU does."""

import json
import os
import subprocess
import sys

import pytest

from megatron_nft.errors import UserError
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import results  # noqa: E402


def result(benchmark: str, device: str = "NVIDIA H200", **more) -> dict:
    ratio = {"name": "time | memory", "value": 1.23456, "goal": "<= 2", "met": True}
    rows = [{"model": "tiny", "tokens": 4096, "figures": {"d": 0.5}}, {"model": "tiny", "tokens": 16384, "seconds": 0.25, "rates": [1]}]
    return {"benchmark": benchmark, "device": device, "date": "2026-01-02", "versions": {"torch": "2.11.0"}, "command": "python x.py",
            "rows": rows, "ratios": [ratio], **more}  # fmt: skip


def write(path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def test_a_section_for_each_file_in_the_order_of_the_commands(tmp_path):
    for name in ("mismatch", "test_gpu", "logprobs"):
        write(tmp_path / f"{name}.json", result(name))
    write(tmp_path / "more.json", {"kinds": {}})  # no result
    found, fragments, pictures = results.load(tmp_path, any_device=False)
    assert [one["benchmark"] for _, one in found] == ["test_gpu", "logprobs", "mismatch"] and not fragments and not pictures
    page = results.page(found)
    assert page.index("## test_gpu: NVIDIA H200") < page.index("## logprobs") < page.index("## mismatch")
    for told in ("logprobs.json, 2026-01-02; torch 2.11.0.", "`python x.py`", "| time \\| memory | 1.235 | <= 2 | yes |"):
        assert told in page
    assert "In all rows: model tiny." in page and "| tokens | figures: d | seconds |" in page and "| 16,384 |  | 0.25 |" in page
    assert "No run on a GPU" not in page


def test_a_page_without_results_says_so_and_names_the_commands(tmp_path):
    page = results.page(*results.load(tmp_path, any_device=False))
    assert "No run on a GPU stands in it yet" in page and "##" not in page
    assert all(f"`{command}`" in page for command, _ in results.COMMANDS)


def test_a_cpus_result_is_refused_unless_it_is_asked_for(tmp_path):
    write(tmp_path / "logprobs.json", result("logprobs", "CPU (AMD EPYC)"))
    with pytest.raises(UserError, match="logprobs.json was measured on CPU"):
        results.load(tmp_path, any_device=False)
    command = [sys.executable, "benchmarks/gpu/results.py", str(tmp_path), "--output", str(tmp_path / "page.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "page.md").exists()
    subprocess.run([*command, "--any-device"], cwd=ROOT, check=True)
    assert "## logprobs: CPU (AMD EPYC)" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"device": "NVIDIA H200", "ro', "x.json is damaged (Unterminated string"),
        (b"\xff", "x.json is damaged ("),
        (b'{"device": "NVIDIA H200", "rows": [], "ratios": []}', "x.json is no whole result: benchmark is 'missing'"),
        (json.dumps(result("logprobs") | {"device": None}).encode(), "x.json is no whole result: device is None"),
    ],
    ids=range(4),
)
def test_a_damaged_result_is_one_line(content, said, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        results.load(tmp_path / "in", any_device=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path / "in"), "--output", str(tmp_path)])
    with pytest.raises(UserError, match="cannot be written .Is a directory.: give --output another place"):
        results.main()


def test_fragments_and_pictures_stand_where_their_summary_tells_a_gpu(tmp_path):
    arms = tmp_path / "in" / "arms"
    arms.mkdir(parents=True)
    write(arms / "summary.json", result("gsm8k"))
    (arms / "arms.md").write_text("## GSM8K: NVIDIA H200\n")
    (arms / "curves.png").write_bytes(b"picture")
    (tmp_path / "in" / "notes.md").write_text("## an estimate")  # beside no summary
    command = [sys.executable, "benchmarks/gpu/results.py", str(tmp_path / "in"), "--output", str(tmp_path / "out" / "page.md")]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "out" / "page.md").read_text()
    assert "## GSM8K: NVIDIA H200" in page and "![gpu-curves.png](gpu-curves.png)" in page and "estimate" not in page
    assert (tmp_path / "out" / "gpu-curves.png").read_bytes() == b"picture" and "## gsm8k" not in page
    write(arms / "summary.json", result("gsm8k", "CPU"))
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 2


def test_a_profile_is_a_table_of_shares():
    kinds = {"matrix products": 0.3, "idle, gaps between launches": 0.1}
    table = results.profile_table("1.5b, bf16", {"span_seconds": 0.4, "kinds": kinds})
    assert "Profile of 1.5b, bf16: 400.0 ms." in table and "| matrix products | 300.0 | 75.0% |" in table


STAND_IN = """#!/usr/bin/env bash
# in Python's place: the second benchmark fails, the others write a result
name=$(basename "$1" .py)
case $name in
  results) exec REAL "$@" ;;
  weight_stream) echo broken >&2; exit 3 ;;
esac
echo "ran $*"
echo '{"benchmark": "'$name'", "device": "NVIDIA H200", "date": "", "versions": {}, "command": "", "rows": [],
  "ratios": [{"name": "of '$name'", "value": 1.5, "goal": "<= 2", "met": true}]}' > "$3"
"""


def test_all_of_them_in_one_go(tmp_path):
    """What fails does not stop the rest; the table at the end has the others' ratios."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.replace("REAL", sys.executable))
    python.chmod(0o755)
    command = ["bash", "benchmarks/gpu/run_all.sh", str(tmp_path / "out"), "logprobs", "weight_stream", "mismatch"]
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "config.json").write_text("{}")
    environment = {**os.environ, "PYTHON": str(python), "MODEL": str(tmp_path / "some")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: weight_stream" in done.stdout and "weight_stream FAILED with 3" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"logprobs.json", "mismatch.json"}
    assert str(tmp_path / "some") in next(line for line in done.stdout.splitlines() if line.startswith("ran") and "mismatch" in line)
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("of ")] == [
        ["of", name, "1.5", "<=", "2", "met"] for name in ("logprobs", "mismatch")
    ]


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        ([], {}, "no folder for the results"),
        (["OUT", "logprob"], {}, "there is no benchmark logprob: use some of logprobs"),
        (["/dev/null/x"], {}, "/dev/null/x cannot be written to"),
        (["OUT"], {"MODEL": "/nowhere"}, "no config.json in /nowhere"),
        (["OUT"], {"PYTHON": "/nowhere"}, "there is no /nowhere: set PYTHON"),
    ],
    ids=range(5),
)
def test_what_cannot_be_run_is_one_line_before_anything_is_measured(arguments, changes, said, tmp_path):
    command = ["bash", "benchmarks/gpu/run_all.sh", *(one.replace("OUT", str(tmp_path / "out")) for one in arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, **changes}, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert not (tmp_path / "out").exists()

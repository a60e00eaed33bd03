"""tools/offline: what is packed is what is unpacked, and a piece that is missing or damaged is one line."""

import argparse
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT, load_example

pack, unpack = (load_example(f"../tools/offline/{name}.py") for name in ("pack", "unpack"))
MIB = 2**20


def wheel(folder: Path, name: str, *needs: str, version: str = "1.0") -> None:
    """A wheel with a module that holds its version, and a file of data."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{name}-{version}.data/purelib/{name}_more.py", "HERE = True\n")
        archive.writestr(f"{name}-{version}.data/scripts/{name}", "#!python\n")
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")


def given(out: Path, **more) -> argparse.Namespace:
    settings = {
        "python": "3.12",
        "platform": "manylinux_2_28_x86_64",
        "there": [],
        "more": [],
        "no_packages": False,
        "file": [],
        "piece": 1,
    }
    return argparse.Namespace(out=out, **settings | more)


@pytest.fixture
def packed(tmp_path, monkeypatch) -> Path:
    """Three parts: packages that need others, a file of 2.3 MiB and a small one."""
    monkeypatch.setattr(pack, "asked_in_setup", lambda: [Requirement("alpha[fast]>=1"), Requirement("torch")])
    out = tmp_path / "packed"
    wheel(out / "wheels", "alpha", "beta>=1", "torch", "gone; python_version < '3.0'", "delta; extra == 'fast'", "epsilon; extra == 'slow'")
    wheel(out / "wheels", "beta", "has-it")
    wheel(out / "wheels", "delta")
    (tmp_path / "model.bin").write_bytes(random.Random(1).randbytes(int(2.3 * MIB)))
    (tmp_path / "small.jsonl").write_text("{}\n")
    pack.pack(given(out, there=["Has_It"], file=[tmp_path / "model.bin", tmp_path / "small.jsonl"]))
    return out


def run_unpack(*arguments: object) -> subprocess.CompletedProcess:
    """As on a machine that has Python alone."""
    words = [sys.executable, "-I", "-S", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True)


def test_there_and_back(packed, tmp_path):
    done = run_unpack(packed / "part1" / "unpack.py", packed, "--target", tmp_path / "site", "--files", tmp_path / "files")
    assert done.returncode == 0 and "3 packages in" in done.stdout and "2 files in" in done.stdout, done.stderr
    assert {file.name for file in (tmp_path / "site").glob("*.py")} == {"alpha_more.py", "beta_more.py", "delta_more.py"}
    assert (tmp_path / "site" / "alpha" / "__init__.py").read_text() == "VERSION = '1.0'\n"
    assert (tmp_path / "site" / "beta-1.0.dist-info" / "METADATA").is_file() and not list((tmp_path / "site").glob("*.whl"))
    for name in ("model.bin", "small.jsonl"):
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert run_unpack(packed / "part1" / "unpack.py", packed, "--target", tmp_path / "site", "--files", tmp_path / "files").returncode == 0


def test_no_part_is_larger_than_asked_and_what_is_there_stays_out(packed):
    parts = sorted(packed.glob("part*"))
    assert [part.name for part in parts] == ["part1", "part2", "part3", "part4"]
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= MIB for part in parts)
    manifest = json.loads((parts[0] / "manifest.json").read_text())
    assert all((part / "manifest.json").read_text() == (parts[0] / "manifest.json").read_text() for part in parts)
    assert {one["name"].split("-")[0] for one in manifest["files"]} == {"alpha", "beta", "delta", "model.bin", "small.jsonl"}


def test_parts_may_be_named_one_by_one_and_from_anywhere(packed, tmp_path):
    carried = []
    for number in (4, 2, 3, 1):
        carried.append(tmp_path / f"call{number}")
        (packed / f"part{number}").rename(carried[-1])
    done = run_unpack(carried[0] / "unpack.py", *carried, "--target", tmp_path / "site", "--files", tmp_path / "files")
    assert done.returncode == 0 and (tmp_path / "files" / "model.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


def damage(packed: Path, how: str) -> str:
    piece = packed / "part2" / "model.bin.002"
    if how == "missing":
        piece.unlink()
        return "model.bin.002 is missing, of part 2 of 4: bring part2 here, too"
    if how == "short":
        piece.write_bytes(piece.read_bytes()[:-1])
        return "model.bin.002 is damaged"
    if how == "changed":
        content = bytearray(piece.read_bytes())
        content[5] ^= 1
        piece.write_bytes(content)
        return "model.bin.002 is damaged"
    file = packed / "part3" / "manifest.json"
    text = file.read_text()
    file.write_text({"mixed": text.replace('"3.12"', '"3.13"'), "other keys": text.replace('"part":', '"number":')}.get(how, "{"))
    return "is of another packing" if how == "mixed" else "manifest.json is damaged"


@pytest.mark.parametrize("how", ["missing", "short", "changed", "mixed", "no manifest", "other keys"])
def test_what_is_damaged_is_one_line_and_nothing_is_written(how, packed, tmp_path):
    said = damage(packed, how)
    done = run_unpack(packed / "part1" / "unpack.py", packed, "--target", tmp_path / "site", "--files", tmp_path / "files")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr
    assert not (tmp_path / "site").exists() and not (tmp_path / "files").exists()


def test_files_want_a_place(packed, tmp_path):
    done = run_unpack(packed / "part1" / "unpack.py", packed, "--target", tmp_path / "site")
    assert done.returncode == 2 and "say with --files" in done.stderr
    done = run_unpack(packed / "part1" / "unpack.py", tmp_path / "empty", "--target", tmp_path / "site")
    assert done.returncode == 2 and "no manifest.json" in done.stderr


@pytest.mark.parametrize(
    "more, said",
    [
        ({"piece": 0}, "--piece is 0"),
        ({"piece": float("nan")}, "--piece is nan"),
        ({"file": [Path("/no/such")]}, "no file at"),
        ({"more": ["a b"]}, "--more"),
        ({}, "nothing to pack"),
    ],
)
def test_what_cannot_be_packed_is_said(more, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "asked_in_setup", list)
    with pytest.raises(pack.Refused, match=said):
        pack.pack(given(tmp_path / "out", **more))


def test_a_place_that_cannot_be_written_to_is_one_line(packed, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["pack.py", str(tmp_path / "file" / "out"), "--no-packages", "--file", str(tmp_path / "file")])
    assert pack.main() == 2
    told = capsys.readouterr().err
    assert "Not a directory" in told and told.count("\n") == 1
    target = tmp_path / "file" / "site"
    done = run_unpack(packed / "part1" / "unpack.py", packed, "--target", target, "--files", tmp_path / "file" / "files")
    assert done.returncode == 2 and "Not a directory" in done.stderr and done.stderr.count("\n") == 1


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(pack.Refused, match="holds something else"):
        pack.pack(given(tmp_path, no_packages=True, file=[tmp_path / "mine.txt"]))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_list_is_that_of_setup_py_and_pins_are_the_locked_ones(tmp_path):
    names = {requirement.name for requirement in pack.asked_in_setup()}
    assert {"omegaconf", "math-verify", "datasets", "torch"} <= names
    (tmp_path / "freeze.txt").write_text("NumPy==2.1\n# a remark\npyarrow @ file:///x\n")
    assert pack.names_in([str(tmp_path / "freeze.txt"), "Py_YAML"]) == {"numpy", "pyarrow", "py-yaml"}
    assert f"omegaconf=={pack.pinned()['omegaconf']}" in (ROOT / "requirements" / "gpu.txt").read_text().splitlines()


def test_platforms_are_named_one_by_one():
    names = pack.Target("3.12", "manylinux_2_17_aarch64").platforms()
    assert names[0] == "manylinux_2_17_aarch64" and {"manylinux2014_aarch64", "manylinux_2_5_aarch64"} <= set(names)
    assert "manylinux_2_18_aarch64" not in names and pack.Target("3.12", "any").platforms() == ["any"]
    assert pack.Target("3.12", "manylinux_2_17_aarch64").environment()["platform_machine"] == "aarch64"

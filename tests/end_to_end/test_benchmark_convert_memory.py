"""The script that measures the conversions runs, and would see a limit that is passed."""

import re
import subprocess
import sys

from tests.support import ROOT


def test_tiny(tmp_path):
    command = [sys.executable, "benchmarks/convert_memory.py", "--tiny", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    peaks = [float(re.search(r"at most (.*) GB of memory resident", line)[1]) for line in lines[:2]]
    assert all(0.1 < peak < 3 for peak in peaks), "the libraries alone are some hundred MB"
    assert lines[2] == "27 tensors are bit for bit what they were" and not any(tmp_path.iterdir())

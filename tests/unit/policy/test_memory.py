"""The meter of the peak memory, on a machine without a GPU."""

import subprocess
import sys

import pytest

from megatron_nft.policy.memory import PeakMemory

MEASURE = """
import numpy as np
from megatron_nft.policy.memory import PeakMemory

meter = PeakMemory()
meter.start()
before = meter.peak()
np.ones(256 * 2**20, np.uint8).sum()  # come and gone
high = meter.peak()
meter.start()
print((high - before) >> 20, (high - meter.peak()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_of_what_came_after_the_start():
    """In a process of its own: in a large one the kernel may take other pages away meanwhile."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    rise, fall = map(int, done.stdout.split())
    assert 250 <= rise < 300 and 200 < fall < 300  # MiB


def test_where_the_peak_cannot_be_forgotten_what_is_resident_is_told(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  900 kB\nVmRSS:\t  300 kB\n")
    (tmp_path / "clear_refs").mkdir()  # not to be written
    meter = PeakMemory(tmp_path)
    meter.start()
    assert meter.peak() == 300 * 1024

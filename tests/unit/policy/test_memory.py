"""The meter of the peak memory, on a machine without a GPU."""

import sys

import numpy as np
import pytest

from megatron_nft.policy.memory import PeakMemory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_of_what_came_after_the_start():
    meter = PeakMemory()
    meter.start()
    before = meter.peak()
    np.ones(64 * MIB, np.uint8).sum()  # come and gone
    high = meter.peak()
    assert high >= before + 60 * MIB
    meter.start()
    assert meter.peak() <= high - 60 * MIB


def test_where_the_peak_cannot_be_forgotten_what_is_resident_is_told(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  900 kB\nVmRSS:\t  300 kB\n")
    (tmp_path / "clear_refs").mkdir()  # not to be written
    meter = PeakMemory(tmp_path)
    meter.start()
    assert meter.peak() == 300 * 1024

"""The policy's tests again, on the newest Megatron-Core that is supported; the environment has the oldest.

Its wheel is for Python 3.12, which alone can install it; unpacked and first on PYTHONPATH it runs on 3.11 as well.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

NEWEST = "0.19.2"
FOLDER = ROOT / "build" / f"megatron-core-{NEWEST}"
CUTS = "(2ranks and float32 and (VPP2 or CP2-float32 or ETP1 or both))"  # virtual stages, context, experts with tensors, data
TESTS = {
    "unit": ["tests/unit/policy"],
    "layouts": ["tests/distributed/test_layouts.py", "tests/distributed/test_fp16.py", "-k", f"{CUTS} or overflow"],
    "conversion": ["tests/end_to_end/test_convert_layouts.py"],
}
if os.environ.get("MEGATRON_NFT_LONG") == "1":
    TESTS["trajectory"] = ["tests/end_to_end/test_trajectory.py"]


@pytest.fixture(scope="module")
def newest() -> Path:
    """The unpacked wheel, fetched once by this environment's pip. Skips, and says why, where pip cannot fetch it."""
    if not FOLDER.is_dir():
        partial = FOLDER.with_name(FOLDER.name + ".partial")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12",
                   f"--dest={partial}", f"megatron-core=={NEWEST}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
        if done.returncode:
            pytest.skip(f"pip could not fetch megatron-core {NEWEST}: {done.stderr.strip()[-300:]}")
        [wheel] = partial.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(partial)
        wheel.unlink()
        partial.rename(FOLDER)
    return FOLDER


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("tests", TESTS.values(), ids=TESTS)
def test_passes(tests, newest):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(newest), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    found = [sys.executable, "-c", "from megatron_nft.policy import versions; print(versions.version())"]
    said = subprocess.run(found, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == NEWEST
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]

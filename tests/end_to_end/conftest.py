"""The runs that several tests look at, or compare with; made once, by whichever of pytest-xdist's workers asks first."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.end_to_end.runs import SETTINGS, SMALL, run


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of that name that make(folder) has filled, the same one for all workers."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run from start to end, never disturbed, and what it printed."""
    folder = once(tmp_path_factory, "finished", lambda folder: run("train", folder / "run", *SETTINGS, log=folder / "log"))
    return folder / "run", (folder / "log").read_text()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A short run of small steps, never disturbed, for those that are killed and stopped."""
    return once(tmp_path_factory, "small", lambda folder: run("train", folder / "run", *SMALL, log=folder / "log")) / "run"

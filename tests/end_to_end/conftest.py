"""The run that several tests look at, or compare with."""

from pathlib import Path

import pytest

from tests.end_to_end.runs import SETTINGS, SMALL, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run from start to end, never disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", run("train", folder / "run", *SETTINGS, log=folder / "log")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A short run of small steps, never disturbed, for those that are killed and stopped."""
    folder = tmp_path_factory.mktemp("small")
    run("train", folder / "run", *SMALL, log=folder / "log")
    return folder / "run"

"""The run that several tests look at, or compare with."""

from pathlib import Path

import pytest

from tests.end_to_end.runs import SETTINGS, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run from start to end, never disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", run("train", folder / "run", *SETTINGS, log=folder / "log")

"""Plans with simple models of memory and time (fakes.py)."""

import pytest

from megatron_nft import config
from megatron_nft.planner import models, plan, search
from tests.unit.planner import fakes

CONFIG = """
run_dir: run
preset: nft-32b
model: {path: somewhere/Qwen2.5-32B}
plan: {nodes: 16}
"""


@pytest.fixture
def file(tmp_path):
    """The 32B preset on 16 nodes, without weights."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path / "config.yaml"


@pytest.fixture
def simple(monkeypatch):
    """Memory and times of fakes.py in place of the planner's."""
    monkeypatch.setattr(plan, "memory", fakes.memory)
    monkeypatch.setattr(plan, "times", fakes.times)
    monkeypatch.setattr(search, "memory", fakes.memory)


@pytest.fixture
def planned(file, simple):
    """overrides -> the plan of the 32B preset."""
    return lambda *overrides: plan.plan(config.load(file, list(overrides)))


@pytest.fixture
def hf() -> dict:
    return models.find("Qwen2.5-32B").hf

import os

import pytest
import torch

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import deterministic

NAMES = list(deterministic.ENVIRONMENT)


@pytest.fixture
def config(monkeypatch) -> Config:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    config = Config(run_dir="unused")
    config.megatron.transformer["deterministic_mode"] = True
    return config


def test_passes_are_deterministic_and_nothing_else(config):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic.passes(config):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory == filled
    with pytest.raises(ZeroDivisionError), deterministic.passes(config):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_user_chose_of_torchs_stays(config):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic.passes(config):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_done_unless_asked(config):
    config.megatron.transformer.clear()
    deterministic.prepare(config)
    assert not set(NAMES) & os.environ.keys()
    with deterministic.passes(config):
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_environment_is_told(config, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    deterministic.check(config)
    deterministic.prepare(config)
    assert [os.environ[name] for name in NAMES] == ["0", ":16:8"]


def test_an_environment_that_asks_for_the_opposite_is_refused(config, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(UserError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO is '1': unset it, or set it to 0"):
        deterministic.check(config)

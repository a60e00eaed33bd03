"""A Transformer Engine that is installed and does not load: packages that stand in for it."""

import sys

import pytest
import torch

from megatron_nft.errors import UserError
from megatron_nft.policy import versions


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A package of that name whose part for torch runs `code`; gpu: whether there is one."""

    def make(code: str, gpu: bool = True, more: str = "") -> None:
        folder = tmp_path / "transformer_engine" / "pytorch"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(code)
        (folder / "quantization.py").write_text(more)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        versions._engine_error.cache_clear()

    before = {name for name in sys.modules if name.startswith("transformer_engine")}
    assert not before, "this test wants an environment without Transformer Engine"
    yield make
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]
    versions._engine_error.cache_clear()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('libcudnn.so.9: cannot open shared object file')", "libcudnn.so.9: cannot open shared object file"),
        ("import a_library_that_is_missing", "No module named 'a_library_that_is_missing'"),
        ("assert False, 'TransformerEngine package version mismatch. Found\\nmore'", "TransformerEngine package version mismatch. Found"),
        ("raise RuntimeError('core shared object not found.')", "core shared object not found."),
    ],
)
def test_one_that_does_not_load_is_refused_where_there_is_a_gpu(code, said, engine):
    engine(code)
    versions.prepare()
    with pytest.raises(UserError) as caught:
        versions.check_transformer_engine()
    assert f"is installed and does not load ({said})" in caught.value.problem and "\n" not in str(caught.value)
    assert "uninstall it" in caught.value.mend


def test_one_that_megatron_does_not_take_is_refused(engine):
    """Megatron was imported without it, as it is where names that it looks for are missing."""
    from megatron.core.models.gpt import gpt_layer_specs

    assert not gpt_layer_specs.HAVE_TE
    engine("")
    with pytest.raises(UserError, match=r"^Megatron-Core \S+ does not take Transformer Engine \("):
        versions.check_transformer_engine()


def test_without_a_gpu_it_is_hidden_from_megatron(engine):
    """Megatron takes an ImportError alone for one that is not there; any other would end a dry run on a login node."""
    engine("raise OSError('libcuda.so.1: cannot open shared object file')", gpu=False)
    versions.prepare()
    with pytest.raises(ImportError):
        import transformer_engine  # noqa: F401
    versions.check_transformer_engine()


def test_what_is_not_installed_is_not_missed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    versions.prepare()
    versions.check_transformer_engine()
    assert versions.fp8_refused("delayed") == ""


def test_its_own_word_on_a_recipe(engine):
    engine("", more="def check_mxfp8_support(): return False, 'capability 10.0'\ndef check_fp8_support(): return True, ''")
    assert versions.fp8_refused("mxfp8") == "capability 10.0"
    assert versions.fp8_refused("tensorwise") == "" and versions.fp8_refused("blockwise") == ""

"""What a model is started from: a directory that is not all there, or whose parts are not of one model, is refused."""

import json
from types import SimpleNamespace

import pytest

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import manifest, model
from tests.support import VOCAB, add_tokenizer, tiny_model


def check(path) -> None:
    config = Config(run_dir="unused")
    config.model.path = str(path)
    model.check(config, window=1)


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    check(tiny_model(tmp_path))
    with pytest.raises(UserError, match=f"has 304 tokens, and the model's embedding {VOCAB} rows"):
        check(add_tokenizer(tmp_path))


@pytest.mark.parametrize(("harm", "says"), [("changed", "config.json is not what was written"), ("missing", "config.json is missing")])
def test_a_checkpoint_is_held_against_its_manifest(harm, says, tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    manifest.write(
        tmp_path, {"layout": {}, "dtype": "float32", "optimizer": False, "state": {}, "files": manifest.secured(tmp_path, [config])}
    )
    config.write_text("[]") if harm == "changed" else config.unlink()
    with pytest.raises(UserError, match=says):
        check(tmp_path)


def test_an_incomplete_checkpoint(tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(UserError, match="is no complete checkpoint"):
        check(tmp_path)


def test_attention_is_told_few_lengths_by_transformer_engine_and_the_exact_one_by_megatron():
    fused, own = SimpleNamespace(apply_rope_fusion=True), SimpleNamespace(apply_rope_fusion=False)
    told = [model.told_length(longest, 2**20, fused) for longest in range(1, 32769)]
    assert all(longest <= rounded <= max(longest + 63, longest * 1.125) for longest, rounded in enumerate(told, 1))
    assert told == sorted(told) and len(set(told)) == 16 + 5 * 8  # multiples of 64 up to 1,024; eight an octave up to 32,768
    assert model.told_length(1000, 1001, fused) == 1001  # never more than there are
    assert model.told_length(1000, 2**20, own) == 1000

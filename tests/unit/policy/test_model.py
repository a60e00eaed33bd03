"""What a model is started from: a directory that is not all there, or whose parts are not of one model, is refused."""

import json

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

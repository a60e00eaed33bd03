"""Which model is meant, what its results are called, and what tells it from another."""

import json
import os
import shutil

import pytest

from megatron_nft.config import Config, EvaluationConfig
from megatron_nft.errors import UserError
from megatron_nft.evaluation.source import Source, find, name_of, opened
from megatron_nft.policy import manifest
from megatron_nft.weights import is_checkpoint, load_weights
from tests.support import ROOT

MODEL = ROOT / "examples/arithmetic/model"


def save(run_dir, step: int, score: float | None = None):
    directory = run_dir / "checkpoints" / f"step_{step}"
    directory.mkdir(parents=True)
    state = {"command": "train", "step": step} | ({} if score is None else {"score": score})
    manifest.write(directory, {"layout": {}, "dtype": "float32", "optimizer": True, "files": {}, "state": state})
    return directory


def test_a_run_is_its_best_or_newest_checkpoint(tmp_path):
    steps = {step: save(tmp_path, step, score) for step, score in ((5, 0.4), (10, 0.6), (20, 0.5))}
    assert find(tmp_path, "best") == steps[10] and find(tmp_path, "newest") == steps[20] and find(tmp_path, "step_5") == steps[5]
    (steps[20] / "manifest.json").unlink()  # a save that did not end
    assert find(tmp_path, "newest") == steps[10]
    with pytest.raises(UserError, match="no checkpoint step_7: .*step_5, step_10, step_20"):
        find(tmp_path, "step_7")
    assert find(steps[5], "best") == steps[5]


def test_without_scores_the_newest_and_without_checkpoints_the_export(tmp_path):
    assert find(save(tmp_path / "a", 3).parent.parent, "best").name == "step_3"
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        find(tmp_path / "b", "best")
    (tmp_path / "b" / "huggingface").mkdir()
    (tmp_path / "b" / "huggingface" / "config.json").write_text("{}")
    assert find(tmp_path / "b", "best") == tmp_path / "b" / "huggingface"
    with pytest.raises(UserError, match="no model directory at"):
        find(tmp_path / "nowhere", "best")
    assert find(MODEL, "best") == MODEL


def test_names_are_none_of_a_trainings(tmp_path):
    names = {"models/Qwen2.5-7B": "Qwen2.5-7B",
             "runs/mine/checkpoints/step_20": "mine-step_20", "runs/mine/huggingface": "mine-huggingface",
             "pretrain/iter_0000500": "pretrain-iter_0000500", "odd/step_3": "odd-step_3", "a b/my model": "my_model"}  # fmt: skip
    assert {path: name_of(tmp_path / path) for path in names} == names


def test_the_fingerprint_is_of_what_the_files_hold(tmp_path):
    copy = shutil.copytree(MODEL, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    given = Source(MODEL, MODEL, "m").fingerprint()
    assert Source(copy, copy, "m").fingerprint() == given
    content = bytearray((copy / "model.safetensors").read_bytes())
    for i in range(10_000, len(content), 997):  # as an update does: everywhere
        content[i] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert Source(copy, copy, "m").fingerprint() != given


def megatron_lm(directory):
    """What stands in the directory of Megatron-LM's; the tensors are of no interest here."""
    (directory / "iter_0000012").mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("12")
    (directory / "iter_0000012" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (directory / "iter_0000012" / "__0_0.distcp").write_bytes(b"tensors")
    return directory


def test_megatron_lms_checkpoint_is_read_in_place_with_anothers_config(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"), evaluation=EvaluationConfig(hf_config=str(MODEL)))
    config.model.path = str(megatron_lm(tmp_path / "pretrain"))
    with opened(config) as source:
        assert not (tmp_path / "run").exists()  # nothing that a kill would leave there
        assert source.name == "pretrain-iter_0000012" and source.given == tmp_path / "pretrain" / "iter_0000012"
        assert config.model.path == str(source.path) and is_checkpoint(source.path)
        manifest.check_weights(source.path)
        assert (source.path / "__0_0.distcp").samefile(source.given / "__0_0.distcp") and (source.path / "tokenizer.json").is_file()
        with pytest.raises(UserError, match=".metadata cannot be read"):  # it is the tensors' turn
            load_weights(source.path)
    assert not source.path.exists() and (source.given / "__0_0.distcp").is_file()
    config.model.path, config.evaluation.hf_config = str(tmp_path / "pretrain"), None
    with pytest.raises(UserError, match="set evaluation.hf_config"), opened(config):
        pass
    assert not (tmp_path / "run").exists()

"""Reading Hugging Face directories: what is wrong with one is said in one UserError that names the file or the tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nft.errors import UserError
from megatron_nft.weights import load_huggingface, save_huggingface
from megatron_nft.weights.huggingface import INDEX, SINGLE
from tests.support import tiny_model

NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sharded(single, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded") / "model"
    source = load_huggingface(single)
    save_huggingface(directory, ((name, source.get(name)) for name in source.names()), single, max_shard_bytes=30_000)
    return directory


@pytest.fixture
def model(single, tmp_path):
    """A copy to damage."""
    return shutil.copytree(single, tmp_path / "model")


@pytest.fixture
def shards(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "shards")


def refused(directory, *said: str) -> None:
    with pytest.raises(UserError) as error:
        load_huggingface(directory)
    for words in said:
        assert words in str(error.value), str(error.value)


def rewrite(directory, change) -> None:
    """Write model.safetensors again after change(tensors)."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def edit(file, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_missing_directory(tmp_path):
    refused(tmp_path / "absent", "no model directory at", "absent")


def test_missing_config(model):
    (model / "config.json").unlink()
    refused(model, "no config.json in", str(model))


@pytest.mark.parametrize("text", ["{", "[1]", "", b"\xff\xfe\x00"])
def test_config_that_is_no_object(model, text):
    (model / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(model, "config.json is no JSON")


def test_unknown_model_type(model):
    edit(model / "config.json", lambda config: config.update(model_type="mystery"))
    refused(model, "'mystery' is not supported", "qwen2")


def test_no_safetensors(model):
    (model / SINGLE).unlink()
    refused(model, "no safetensors in")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_safetensors(model, kept):
    content = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(content[:kept])
    refused(model, SINGLE, "damaged or incomplete")


def test_missing_tensor(model):
    rewrite(model, lambda tensors: tensors.pop(NORM))
    refused(model, "lacks 1 tensors", NORM)


def test_extra_tensor(model):
    rewrite(model, lambda tensors: tensors.update({"model.layers.9.input_layernorm.weight": torch.ones(32)}))
    refused(model, "holds 1 tensors its config.json has no place for", "model.layers.9.input_layernorm.weight")


def test_wrong_shape(model):
    rewrite(model, lambda tensors: tensors.update({NORM: torch.ones(33)}))
    refused(model, NORM, "(33,)", "(32,)")


def test_unknown_dtype_is_named_when_asked_for(model):
    rewrite(model, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.float64)}))
    with pytest.raises(UserError, match=f"{NORM}.*F64"):
        load_huggingface(model).dtypes()


def test_a_tied_head_of_unknown_dtype(model):
    rewrite(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].double()}))
    refused(model, "lm_head.weight in", "is stored as F64")


def test_index_that_hides_tensors(shards):
    """But not those that say nothing new."""
    file = shards / json.loads((shards / INDEX).read_text())["weight_map"][NORM]
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, metadata={"format": "pt"})
    load_huggingface(shards)
    save_file(tensors | {"model.layers.9.input_layernorm.weight": torch.ones(32)}, file, metadata={"format": "pt"})
    refused(shards, file.name, "holds model.layers.9.input_layernorm.weight, which", "does not name")


def test_index_that_is_no_index(shards):
    edit(shards / INDEX, lambda index: index.pop("weight_map"))
    refused(shards, INDEX, "no weight_map")


def test_index_that_names_no_file(shards):
    edit(shards / INDEX, lambda index: index["weight_map"].update({NORM: 7}))
    refused(shards, INDEX, NORM)


def test_index_that_lies(shards):
    index = json.loads((shards / INDEX).read_text())
    elsewhere = next(file for file in index["weight_map"].values() if file != index["weight_map"][NORM])
    edit(shards / INDEX, lambda index: index["weight_map"].update({NORM: elsewhere}))
    refused(shards, INDEX, NORM, elsewhere)


def test_missing_shard(shards):
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(shards, gone.name, "is missing")


def test_truncated_shard(shards):
    cut = sorted(shards.glob("model-*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    refused(shards, cut.name, "damaged or incomplete")


def test_tied_model_with_and_without_the_head_in_its_file(model):
    without = load_huggingface(model)
    assert "lm_head.weight" not in load_file(model / SINGLE) and "lm_head.weight" not in without.names()
    rewrite(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load_huggingface(model).names() == without.names()


def test_tied_model_with_another_head_in_its_file(model):
    """It would be lost."""
    rewrite(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    refused(model, "lm_head.weight", "tie_word_embeddings")


def test_untied_model_without_a_head(model):
    edit(model / "config.json", lambda config: config.update(tie_word_embeddings=False))
    refused(model, "lacks 1 tensors", "lm_head.weight")


def test_rope_frequencies_of_old_files_are_passed_over(model):
    rewrite(model, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in load_huggingface(model).names()

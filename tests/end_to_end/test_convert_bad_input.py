"""Conversions of models of several dtypes, and of what is damaged or of wrong form: kept to the bit, or refused in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nft import cli
from tests.support import tiny_model

NORM = "model.layers.2.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A bfloat16 model with one tensor in float32 and NaNs of several bits, and its checkpoint."""
    directory = tmp_path_factory.mktemp("pair")
    source = tiny_model(directory / "source", "llama", False, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors[NORM] = tensors[NORM].float() + 2**-20
    tensors[DOWN].view(torch.int16).view(-1)[:5] = torch.tensor([0x7FC0, 0x7F81, -1, -64, -128], dtype=torch.int16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["convert", "hf-to-megatron", str(source), str(directory / "megatron")]) == 0
    return source, directory / "megatron"


def refused(capsys, *arguments) -> str:
    """The one line that the command line says."""
    capsys.readouterr()
    assert cli.main(["convert", *map(str, arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("own_config", [False, True])
def test_dtypes_and_bits_come_back(pair, tmp_path, own_config):
    """With the config of the checkpoint, and with one that is given."""
    source, checkpoint = pair
    given = ["--hf-config", str(source)] if own_config else []
    assert cli.main(["convert", "megatron-to-hf", str(checkpoint), str(tmp_path / "out"), *given]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and after[NORM].dtype == torch.float32
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize(("old", "new"), [("layers.0.", "layers.9."), ('"bfloat16"', '"bfloau16"')], ids=["name", "dtype"])
@pytest.mark.parametrize("checksum", [True, False])
def test_changed_dtypes_in_the_manifest(pair, tmp_path, capsys, old, new, checksum):
    """They show in its checksum, and so does that it is missing."""
    damaged = shutil.copytree(pair[1], tmp_path / "damaged") / "manifest.json"
    damaged.write_text(damaged.read_text().replace(old, new))
    if not checksum:
        content = json.loads(damaged.read_text())
        del content["checksum"]
        damaged.write_text(json.dumps(content))
    line = refused(capsys, "megatron-to-hf", damaged.parent, tmp_path / "out")
    assert "manifest.json is not what was written" in line
    assert line.endswith("convert the model again") and not (tmp_path / "out").exists()


def write(name: str, content):
    """A file of a directory becomes this JSON."""
    return lambda directory: (directory / name).write_text(json.dumps(content))


def change(name: str, **fields):
    """Fields of a JSON file become these."""
    return lambda directory: write(name, json.loads((directory / name).read_text()) | fields)(directory)


def dangling(directory: Path) -> None:
    (directory / "tokenizer_config.json").symlink_to("nowhere")


TOKENIZERS = [[1], None, {"model": "x"}, {"added_tokens": [{}]}, {"added_tokens": [{"id": "five"}]}, {"added_tokens": {"a": 1}},
              {"model": {"vocab": {"a": "b"}}}, {"model": {"vocab": 5}}]  # fmt: skip
INDEX, LONG = "model.safetensors.index.json", "n" * 300
WRONG = {
    **{f"tokenizer {content}": (write("tokenizer.json", content), "tokenizer.json ") for content in TOKENIZERS},
    "vocab.json": (write("vocab.json", [1]), "vocab.json is no JSON object"),
    "family": (change("config.json", model_type=["qwen2"]), "model_type ['qwen2'] is not supported"),
    "head_dim": (change("config.json", head_dim={"a": 1}), "head_dim in config.json is {'a': 1}"),
    "window": (change("config.json", max_position_embeddings="x"), "is 'x', no number"),
    "experts": (
        change("config.json", model_type="qwen3_moe", num_experts=4, moe_intermediate_size=8, mlp_only_layers=5),
        "config.json is not of a qwen3_moe model's form",
    ),
    "rope": (change("config.json", rope_parameters="x"), "rope settings in config.json are 'x'"),
    "dangling": (dangling, "tokenizer_config.json cannot be read or written (No such file or directory)"),
}


@pytest.mark.parametrize(("damage", "said"), WRONG.values(), ids=WRONG)
def test_files_of_wrong_form(pair, tmp_path, capsys, damage, said):
    source = shutil.copytree(pair[0], tmp_path / "source")
    damage(source)
    assert said in refused(capsys, "hf-to-megatron", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"metadata": [1]}, "has no object as its metadata"), ({"weight_map": {NORM: LONG}}, "File name too long")],
    ids=["metadata", "long name"],
)
def test_index_of_wrong_form(pair, tmp_path, capsys, fields, said):
    source = shutil.copytree(pair[0], tmp_path / "source")
    file = (source / "model.safetensors").rename(source / "model-1.safetensors")
    write(INDEX, {"weight_map": dict.fromkeys(load_file(file), file.name)} | fields)(source)
    assert said in refused(capsys, "hf-to-megatron", source, tmp_path / "out")


def test_a_directory_that_may_not_be_read(pair, tmp_path, capsys, monkeypatch):
    """As another user finds it; permissions do not bind the one who runs the tests as root."""
    source, opened = shutil.copytree(pair[0], tmp_path / "source"), open

    def closed(file, *arguments, **options):
        if Path(str(file)).name == "model.safetensors":
            raise PermissionError(13, os.strerror(13), str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", closed)
    assert "model.safetensors cannot be read or written (Permission denied)" in refused(capsys, "hf-to-megatron", source, tmp_path / "out")

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
    """They show in its checksum; in a manifest of old, which has none, in what they name."""
    damaged = shutil.copytree(pair[1], tmp_path / "damaged") / "manifest.json"
    damaged.write_text(damaged.read_text().replace(old, new))
    if not checksum:
        content = json.loads(damaged.read_text())
        del content["checksum"]
        damaged.write_text(json.dumps(content))
    line = refused(capsys, "megatron-to-hf", damaged.parent, tmp_path / "out")
    assert ("manifest.json is not what was written" if checksum else "there is no such dtype") in line
    assert line.endswith("convert the model again") and not (tmp_path / "out").exists()

"""Conversions beside Megatron's own saves and loads on two ranks: what Megatron-LM saves is read, what is written loads anywhere."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nft import cli
from megatron_nft.weights import load_huggingface
from tests.support import VOCAB, run_ranks, tiny_model

PADDED = 256  # of Megatron-LM: 101 rows, up to a multiple of 128 a tensor-parallel rank
TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
FAMILIES = {"qwen2": True, "llama": False, "qwen3_moe": False}  # with a tied head, or not
LOADS = {"qwen2": {"tp2": TP2, "pp2": PP2}, "llama": {"tp2": TP2, "pp2": PP2}, "qwen3_moe": {"ep2": EP2, "tp2": TP2, "pp2": PP2}}
SAVES = {  # family, layout, what Megatron-LM's options put into the metadata
    "axes": ("llama", TP2, {}),
    "numbers": ("qwen2", PP2, {"non_homogeneous_layers": True}),
    "experts": ("qwen3_moe", EP2, {}),
    "singletons": ("qwen3_moe", TP2, {"singleton_local_shards": True}),
}


@pytest.fixture(scope="module")
def worked(tmp_path_factory) -> Path:
    """All jobs of the two ranks in one start of them."""
    directory = tmp_path_factory.mktemp("layouts")
    jobs = []
    for family, tied in FAMILIES.items():
        source = tiny_model(directory / family, family, tied, torch.bfloat16)
        _padded(source, directory / f"{family}-padded")
        assert cli.main(["convert", "hf-to-megatron", str(source), str(directory / f"{family}-converted")]) == 0
        jobs += [
            {"do": "load", "source": str(source), "checkpoint": str(directory / f"{family}-converted"), "parallel": parallel,
             "output": str(directory / f"{family}-{name}.pt")}
            for name, parallel in LOADS[family].items()
        ]  # fmt: skip
    for name, (family, parallel, metadata) in SAVES.items():
        given = {"source": str(directory / f"{family}-padded"), "parallel": parallel, "output": str(directory / name)}
        jobs.append({"do": "save", **given, "metadata": metadata, "optimizer": name == "axes"})
    run_ranks(Path(__file__).with_name("checkpoint_worker.py"), 2, {"jobs": jobs}, directory)
    return directory


def _padded(source: Path, directory: Path) -> None:
    """The model with more rows than its tokenizer has tokens, filled with what must not come out."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": PADDED}))
    tensors = load_file(source / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = torch.cat([tensors[name], tensors[name].new_full((PADDED - VOCAB, tensors[name].shape[1]), 7.0)])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_same(tensors: dict[str, torch.Tensor], source: Path) -> None:
    expected = load_huggingface(source)
    assert sorted(tensors) == sorted(expected.names())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected.get(name)), name


@pytest.mark.parametrize("family, layout", [(family, layout) for family in LOADS for layout in LOADS[family]])
def test_converted_loads_under(worked, family, layout):
    assert_same(torch.load(worked / f"{family}-{layout}.pt"), worked / family)


@pytest.mark.parametrize("kind", SAVES)
def test_megatron_lm_checkpoint(worked, tmp_path, capsys, kind):
    """By the directory above the iteration; without the config's directory, one line says what to give."""
    source, output = worked / SAVES[kind][0], tmp_path / "out"
    command = ["convert", "megatron-to-hf", str(worked / kind), str(output)]
    assert cli.main(command) == 2
    assert "give --hf-config HF_DIR" in capsys.readouterr().err and not any(tmp_path.iterdir())
    assert cli.main([*command, "--hf-config", str(source)]) == 0
    assert_same(load_file(output / "model.safetensors"), source)
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_megatron_lm_checkpoint_of_another_model(worked, tmp_path, capsys):
    for config, said in (
        ("qwen2", "has a head of its own"),
        ("qwen3_moe", "decoder.layers.0.mlp.linear_fc1.weight, for which its config has no place"),
    ):
        command = ["convert", "megatron-to-hf", str(worked / "axes"), str(tmp_path / "out"), "--hf-config", str(worked / config)]
        assert cli.main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert said in line, line
    assert not any(tmp_path.iterdir())

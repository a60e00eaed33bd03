"""Hugging Face <-> Megatron checkpoints through the command line. Run as a script, this file is one rank of the tensor-parallel test."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nft import cli, verify
from megatron_nft.errors import UserError
from megatron_nft.weights import load_huggingface
from tests.support import ROOT, VOCAB, run_ranks, tiny_model

NORM = "model.layers.2.input_layernorm.weight"


ONE_IS_ENOUGH = pytest.mark.parametrize("converted", ["llama untied"], indirect=True)


def run(*command) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


def convert_command(*arguments) -> str:
    done = run("-m", "megatron_nft", "convert", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_tokenizer(directory: Path) -> Path:
    """Files that stand for a tokenizer: they are copied, not read."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text(f'{{"name": "{name}"}}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("tool")
    return directory


@pytest.fixture(scope="module", params=["qwen2 tied", "llama untied"])
def converted(request, tmp_path_factory) -> tuple[Path, Path]:
    """A bfloat16 model and its checkpoint."""
    family, tied = request.param.split()
    directory = tmp_path_factory.mktemp("convert")
    source = with_tokenizer(tiny_model(directory / "source", family, tied == "tied", torch.bfloat16))
    said = convert_command("hf-to-megatron", source, directory / "megatron")
    tensors = len(load_huggingface(source).names())
    assert f"wrote {directory / 'megatron'}: {tensors} tensors, " in said and " GB/s" in said
    return source, directory / "megatron"


def test_there_and_back(converted, tmp_path):
    """The way back needs the checkpoint alone; the files, not only the numbers, are the same; so are transformers' logits."""
    from transformers import AutoModelForCausalLM

    source, checkpoint = converted
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    convert_command("megatron-to-hf", moved, tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()}
    for file in files - {Path("model.safetensors")}:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mine, theirs = (AutoModelForCausalLM.from_pretrained(directory, dtype="auto") for directory in (tmp_path / "back", source))
    assert mine.dtype == torch.bfloat16 and torch.equal(mine(tokens).logits, theirs(tokens).logits)


@ONE_IS_ENOUGH
def test_two_tensor_parallel_ranks(converted, tmp_path):
    """A converted checkpoint loads under TP 2, and what TP 2 trains in float32 is exported as float32, without the padded vocabulary."""
    source, checkpoint = converted
    arguments = {"source": str(source), "converted": str(checkpoint), "step": str(tmp_path / "step_1"), "seen": str(tmp_path / "seen.pt")}
    run_ranks(Path(__file__), 2, arguments, tmp_path)
    seen = torch.load(tmp_path / "seen.pt")
    expected = load_file(source / "model.safetensors")
    assert seen["converted"].keys() == seen["trained"].keys() == expected.keys()
    assert all(torch.equal(seen["converted"][name], tensor) for name, tensor in expected.items())
    convert_command("megatron-to-hf", tmp_path / "step_1", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys() and all(tensor.dtype == torch.float32 for tensor in written.values())
    assert all(torch.equal(written[name], tensor) for name, tensor in seen["trained"].items())
    assert not torch.equal(written[NORM], expected[NORM].float()), "the trained weights are those of the start"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def rank() -> None:
    """One of two ranks: stream the converted checkpoint's weights; save a training checkpoint of other weights."""
    from megatron_nft import policy
    from megatron_nft.config import Config

    arguments = json.loads(Path(sys.argv[1]).read_text())
    settings = Config(run_dir="")
    settings.model.path, settings.model.precision, settings.parallel.tensor_model_parallel_size = arguments["source"], "bf16", 2
    topology = policy.initialize(settings.parallel, seed=1)
    held = policy.Policy(settings, topology, trainable=False, weights=False)
    held.load(Path(arguments["converted"]))
    seen = {"converted": {name: tensor.clone() for name, tensor in held.weights()}}
    settings.model.precision = "fp32"
    trained = policy.Policy(settings, topology)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.mul_(1.001)
    seen["trained"] = {name: tensor.clone() for name, tensor in trained.weights()}
    with pytest.raises(UserError, match="weights without an optimizer"):
        trained.load(Path(arguments["converted"]))
    trained.save(Path(arguments["step"]), {"step": 1})
    if topology.is_first:
        torch.save(seen, arguments["seen"])
    policy.shutdown()


def test_verify_keeps_every_dtype(tmp_path):
    """Through the script; a float16 model with one float32 tensor, as quirky as models get."""
    source = tiny_model(tmp_path / "source", "llama", tie=True, dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors[NORM] = tensors[NORM].float() + 2**-20  # float16 does not hold it
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = run("tools/convert/verify.py", source)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert f"{len(tensors)} tensors, bit-identical; names, shapes and dtypes as the index says" in said
    assert re.search(r"differ by at most (0\.0e\+00|\d\.\de-0[5-9]) \(tolerance 1e-04, float32", said[-2]), said
    assert said[-1] == "greedy text of 32 tokens is the same after 4 of 4 prompts"


def test_differences_name_what_is_not_the_same(tmp_path):
    before, after = (tiny_model(tmp_path / name, "llama", tie=True, dtype=torch.bfloat16) for name in ("before", "after"))
    assert verify.differences(load_huggingface(before), load_huggingface(after)) == []
    tensors = load_file(after / "model.safetensors")
    tensors[NORM][3] = -tensors[NORM][3]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.embed_tokens.weight"][0, :2] = torch.tensor([0.0, float("nan")])
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    assert sorted(verify.differences(load_huggingface(before), load_huggingface(after))) == [
        "model.embed_tokens.weight differs in 2 of 3232 numbers",
        f"{NORM} differs in 1 of 32 numbers",
        "model.norm.weight was bfloat16 [32], is float32 [32]",
    ]
    assert verify.differences(load_huggingface(after), load_huggingface(after)) == [], "a NaN is equal to itself"


def test_scripts_exit_with_2_and_one_line(tmp_path):
    for script in ("hf_to_megatron", "megatron_to_hf"):
        done = run(f"tools/convert/{script}.py", tmp_path / "absent", tmp_path / "out")
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and "absent" in done.stderr, done.stderr
    assert not any(tmp_path.iterdir())


def refused(capsys, *arguments) -> str:
    """The one line that the command line says."""
    assert cli.main(["convert", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


@ONE_IS_ENOUGH
def test_what_is_no_source(converted, tmp_path, capsys):
    source, checkpoint = converted
    assert "no model directory at" in refused(capsys, "hf-to-megatron", tmp_path / "absent", tmp_path / "out")
    assert "no model directory at" in refused(capsys, "verify", tmp_path / "absent")
    assert "no safetensors in" in refused(capsys, "hf-to-megatron", checkpoint, tmp_path / "out")
    assert "is no distributed checkpoint" in refused(capsys, "megatron-to-hf", source, tmp_path / "out", "--hf-config", source)
    assert "no config.json in" in refused(capsys, "megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", tmp_path)
    assert "is no directory" in refused(capsys, "megatron-to-hf", tmp_path / "absent", tmp_path / "out")
    assert "manifest.json is missing" in refused(capsys, "megatron-to-hf", source, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@ONE_IS_ENOUGH
def test_occupied_output(converted, tmp_path, capsys):
    source, checkpoint = converted
    (tmp_path / "precious").write_text("1")
    assert "exists already" in refused(capsys, "hf-to-megatron", source, tmp_path)
    assert "exists already" in refused(capsys, "megatron-to-hf", checkpoint, tmp_path)
    assert "exists already" in refused(capsys, "megatron-to-hf", checkpoint, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@ONE_IS_ENOUGH
@pytest.mark.parametrize("file", ["config.json", "additional_chat_templates/tool.jinja", ".metadata", "common.pt", "__0_0.distcp"])
@pytest.mark.parametrize("harm", ["missing", "cut", "zeros"])
def test_damaged_checkpoint(converted, tmp_path, capsys, file, harm):
    damaged = shutil.copytree(converted[1], tmp_path / "damaged") / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] if harm == "cut" else bytes(len(content)))
    if harm == "missing":
        damaged.unlink()
    said = refused(capsys, "megatron-to-hf", tmp_path / "damaged", tmp_path / "out")
    assert f"is damaged: {file} is" in said and not (tmp_path / "out").exists()


@ONE_IS_ENOUGH
def test_damaged_manifest(converted, tmp_path, capsys):
    manifest = shutil.copytree(converted[1], tmp_path / "damaged") / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content[:-5])
    assert "manifest.json is no JSON" in refused(capsys, "megatron-to-hf", manifest.parent, tmp_path / "out")
    manifest.write_text(json.dumps({name: value for name, value in json.loads(content).items() if name != "dtype"}))
    assert "manifest.json lacks dtype" in refused(capsys, "megatron-to-hf", manifest.parent, tmp_path / "out")


@ONE_IS_ENOUGH
def test_more_than_one_rank(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 ranks" in refused(capsys, "hf-to-megatron", converted[0], tmp_path / "out")
    assert "2 ranks" in refused(capsys, "megatron-to-hf", converted[1], tmp_path / "out")


def test_a_checkpoint_is_a_model_to_start_from(converted):
    """model.path may name it: the checks before a run pass, and the policy has its weights."""
    from megatron_nft import policy
    from megatron_nft.convert import one_process, settings_of

    source, checkpoint = converted
    with one_process() as place:
        settings = settings_of(checkpoint, torch.bfloat16)
        policy.check(settings, window=8)
        weights = dict(policy.Policy(settings, place, trainable=False).weights())
    expected = load_file(source / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


if __name__ == "__main__":
    rank()

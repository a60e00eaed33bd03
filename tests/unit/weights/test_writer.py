"""Writing Hugging Face directories: read back by transformers, complete or not there."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_nft.errors import UserError
from megatron_nft.weights import load_huggingface, save_huggingface
from megatron_nft.weights.huggingface import INDEX, SINGLE
from tests.support import tiny_model

COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tiny_model(tmp_path_factory.mktemp("template"), "llama", tie=False)
    for name in COMPANIONS[2:]:
        (directory / name).write_text(f'"{name}"')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (directory / "pytorch_model.bin").write_text("not to be copied")
    return directory


def tensors(directory, dtype=torch.float32):
    source = load_huggingface(directory)
    return ((name, source.get(name).to(dtype)) for name in source.names())


def held(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("limit, several", [(5e9, False), (20_000, True)])
def test_transformers_reads_it_back(template, tmp_path, limit, several):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    save_huggingface(out, tensors(template), template, max_shard_bytes=limit)
    files = sorted(out.glob("*.safetensors"))
    assert (out / INDEX).is_file() == several and (out / SINGLE).is_file() != several
    assert (len(files) > 2) == several and sum(file.stat().st_size for file in files[:1]) <= limit + 10_000
    mine, theirs = (AutoModelForCausalLM.from_pretrained(directory).state_dict() for directory in (out, template))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_index_counts_bytes_and_names_every_tensor_once(template, tmp_path):
    save_huggingface(tmp_path / "out", tensors(template), template, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in tensors(template))
    assert sorted(index["weight_map"]) == sorted(load_huggingface(template).names())
    shards = [load_file(file) for file in sorted((tmp_path / "out").glob("model-*.safetensors"))]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    firsts = [next(tensor.nbytes for name, tensor in tensors(template) if name in shard) for shard in shards[1:]]
    assert all(size <= 20_000 for size in sizes) and sum(sizes) == index["metadata"]["total_size"]
    assert all(size + first > 20_000 for size, first in zip(sizes, firsts)), "a shard was closed before it was full"


def test_companions_are_copied_and_nothing_else(template, tmp_path):
    save_huggingface(tmp_path / "out", tensors(template), template)
    assert held(tmp_path / "out") == sorted([*COMPANIONS, SINGLE, "additional_chat_templates"])
    for name in [*COMPANIONS, "additional_chat_templates/tool.jinja"]:
        assert (tmp_path / "out" / name).read_bytes() == (template / name).read_bytes(), name


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_config_names_the_dtype_that_was_written(template, tmp_path, keys):
    other = tmp_path / "template"
    other.mkdir()
    config = json.loads((template / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (other / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
    save_huggingface(tmp_path / "out", tensors(template, torch.bfloat16), other)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | dict.fromkeys(keys or ("torch_dtype",), "bfloat16")


def test_existing_directory_is_refused_and_unharmed(template, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")

    def never():
        raise AssertionError("a tensor was asked for")
        yield

    with pytest.raises(UserError, match=r"out exists already"):
        save_huggingface(out, never(), template)
    assert held(out) == ["precious"] and held(tmp_path) == ["out"]
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match=r"file exists already"):
        save_huggingface(tmp_path / "file", never(), template)


def test_replace_takes_the_place_but_not_of_the_template(template, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    save_huggingface(out, tensors(template), template, replace=True)
    assert "old" not in held(out) and SINGLE in held(out)
    before = held(template)
    with pytest.raises(UserError, match="exists already"):
        save_huggingface(template, tensors(template), template, replace=True)
    assert held(template) == before


def test_empty_directory_is_used(template, tmp_path):
    (tmp_path / "out").mkdir()
    save_huggingface(tmp_path / "out", tensors(template), template)
    assert SINGLE in held(tmp_path / "out")


@pytest.mark.parametrize("replace", [False, True])
def test_failing_stream_leaves_what_was_there(template, tmp_path, replace):
    out = tmp_path / "out"
    if replace:
        out.mkdir()
        (out / "old").write_text("1")

    def breaks():
        for number, pair in enumerate(tensors(template)):
            if number == 20:
                raise ConnectionError("the other rank is gone")
            yield pair

    with pytest.raises(ConnectionError, match="the other rank is gone"):
        save_huggingface(out, breaks(), template, max_shard_bytes=10_000, replace=replace)
    assert held(tmp_path) == (["out"] if replace else [])
    assert not replace or held(out) == ["old"]


def test_leftovers_of_a_killed_run_do_not_get_in(template, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "shard-7").write_text("1")
    save_huggingface(tmp_path / "out", tensors(template), template)
    assert held(tmp_path) == ["out"] and "shard-7" not in held(tmp_path / "out")


def test_template_without_config(template, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json in .*empty"):
        save_huggingface(tmp_path / "out", tensors(template), tmp_path / "empty")
    assert held(tmp_path) == ["empty"]

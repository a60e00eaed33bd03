"""Distributed checkpoints read without Megatron-Core: every form of its keys, any cut, padded vocabularies; what is no such checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_nft.errors import UserError
from megatron_nft.weights import TorchDistWeights, find_iteration, load_huggingface
from tests.support import VOCAB, tiny_model

LAYERS, EXPERTS = 4, 4
FAMILIES = ["qwen2 tied", "llama untied", "qwen3_moe untied"]


class Planner(DefaultSavePlanner):
    """Writes given tensors in given pieces: those of as many ranks."""

    def __init__(self, tensors: dict[str, torch.Tensor], pieces: int):
        super().__init__(flatten_state_dict=False)
        self.tensors, self.pieces = tensors, pieces

    def items(self):
        for key, tensor in self.tensors.items():
            dim = tensor.ndim - 1  # the last: rows and columns are both cut somewhere
            for part, offset in zip(tensor.chunk(self.pieces, dim), range(0, tensor.shape[dim], -(-tensor.shape[dim] // self.pieces))):
                at = torch.Size([0] * dim + [offset])
                data = TensorWriteData(ChunkStorageMetadata(at, part.shape), TensorProperties(tensor.dtype), tensor.shape)
                yield WriteItem(MetadataIndex(key, at), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item):
        chunk = write_item.tensor_data.chunk
        return self.tensors[write_item.index.fqn][tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))].clone()


def write(directory: Path, tensors: dict[str, torch.Tensor], pieces: int = 3) -> Path:
    """A torch_dist directory of these tensors."""
    planner, writer = Planner(tensors, pieces), FileSystemWriter(directory)
    plans, metadata = planner.create_global_plan([SavePlan(list(planner.items()))])
    directory.mkdir(parents=True)
    [plan] = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return directory


def megatron_keys(source, stacked: bool, halves: bool, padding: int = 7) -> dict[str, torch.Tensor]:
    """A model's tensors as Megatron-Core keeps them. stacked: layers and experts are axes; halves: gate and up are kept apart."""
    table, named = source.table, {}
    for name in table.megatron_names():
        full = table.to_megatron(name, source.get)
        if name.startswith(("embedding.", "output_layer.")):
            full = torch.cat([full, full.new_full((padding, full.shape[1]), 9.0)])
        key = name.replace("mlp.experts.local_experts.", "mlp.experts.experts.")
        for local, fused in (
            ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        ):
            key = key.replace(local, fused)
        if halves and key.endswith("linear_fc1.weight"):
            named |= dict(zip((f"{key}_w", f"{key}_v"), full.chunk(2)))
        else:
            named[key] = full
    return _stack(named, moe=bool(table.sizes.experts)) if stacked else named


def _stack(named: dict[str, torch.Tensor], moe: bool) -> dict[str, torch.Tensor]:
    """Experts as an axis; layers too in a model whose layers are alike."""
    out = {}
    for key in named:
        if ".experts.experts." in key:
            head, tail = key.split(".experts.experts.")
            tail = tail.partition(".")[2]
            out[f"{head}.experts.experts.{tail}"] = torch.stack([named[f"{head}.experts.experts.{e}.{tail}"] for e in range(EXPERTS)])
        else:
            out[key] = named[key]
    if moe:
        return out
    first = [key for key in out if key.startswith("decoder.layers.0.")]
    layers = {
        k.replace("layers.0.", "layers."): torch.stack([out[k.replace("layers.0.", f"layers.{i}.")] for i in range(LAYERS)]) for k in first
    }
    return {key: tensor for key, tensor in out.items() if not key.startswith("decoder.layers.")} | layers


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    family, tied = request.param.split()
    return load_huggingface(tiny_model(tmp_path_factory.mktemp("source"), family, tied == "tied", torch.bfloat16))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(source, its checkpoint): to damage, copy."""
    directory = tmp_path_factory.mktemp("llama")
    held = load_huggingface(tiny_model(directory / "source", "llama", False, torch.bfloat16))
    return held, write(directory / "iter_0000007", megatron_keys(held, stacked=True, halves=False))


@pytest.mark.parametrize("stacked", [True, False], ids=["axes", "numbers"])
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
def test_every_form_of_the_keys(source, tmp_path, stacked, halves):
    tensors = megatron_keys(source, stacked, halves)
    others = {"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.ones(5), "rng": torch.ones(2)}
    read = TorchDistWeights(write(tmp_path / "it", tensors | others), source.config)
    assert read.names() == source.names() and read.shapes() == source.shapes() and read.dtypes() == source.dtypes()
    for name in source.names():
        assert torch.equal(read.get(name), source.get(name)), name
    for name in source.table.megatron_names():
        assert torch.equal(read.megatron(name), source.table.to_megatron(name, source.get)), name


def test_a_dtype_that_no_model_here_has(llama, tmp_path):
    tensors = megatron_keys(llama[0], stacked=True, halves=False)
    read = TorchDistWeights(write(tmp_path / "it", {key: tensor.double() for key, tensor in tensors.items()}), llama[0].config)
    with pytest.raises(UserError, match="is stored as torch.float64: choose a model in bfloat16, float16 or float32"):
        read.dtypes()


@pytest.mark.parametrize("field", [b"offsets", b"sizes", b"properties"])
def test_an_index_with_a_changed_field(llama, tmp_path, field):
    """It is still a pickle, of objects that lack something."""
    file = shutil.copytree(llama[1], tmp_path / "it") / ".metadata"
    file.write_bytes(file.read_bytes().replace(field, b"X" * len(field)))
    with pytest.raises(UserError, match="is damaged: .metadata cannot be read"):
        TorchDistWeights(file.parent, llama[0].config)


def test_only_what_is_asked_for_is_read(llama, monkeypatch):
    """A tensor among the layers' stacked ones is read alone: no more than its own pieces are opened."""
    from torch.distributed.checkpoint import FileSystemReader

    held, directory = llama
    plans, original = [], FileSystemReader.read_data
    monkeypatch.setattr(FileSystemReader, "read_data", lambda self, plan, planner: plans.append(plan) or original(self, plan, planner))
    read = TorchDistWeights(directory, held.config)
    read.get("model.layers.2.mlp.down_proj.weight")
    assert {item.storage_index.fqn for plan in plans for item in plan.items} == {"decoder.layers.mlp.linear_fc2.weight"}
    assert {tuple(item.storage_offsets)[0] for plan in plans for item in plan.items} == {2}


def test_the_newest_iteration_is_found(llama, tmp_path):
    shutil.copytree(llama[1], tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert find_iteration(tmp_path) == tmp_path / "iter_0000007" == find_iteration(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "iter_0000007").rename(tmp_path / "release")
    assert find_iteration(tmp_path) == tmp_path / "release"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(UserError, match="'soon', which is no iteration"):
        find_iteration(tmp_path)


@pytest.mark.parametrize(
    "content, said", [(None, "is no distributed checkpoint"), ('{"sharded_backend": "zarr"}', "has the format zarr"), ("{", "is no JSON")]
)
def test_what_is_no_such_checkpoint(tmp_path, content, said):
    if content:
        (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=said):
        find_iteration(tmp_path)


def refused(directory: Path, config: dict) -> str:
    with pytest.raises(UserError) as error:
        weights = TorchDistWeights(directory, config)
        for name in weights.names():
            weights.get(name)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_hidden_layers": 3}, "layers.3"),
        ({"num_hidden_layers": 5}, "lacks"),
        ({"intermediate_size": 64}, "linear_fc1.weight in"),
        ({"vocab_size": VOCAB + 8}, "embedding.word_embeddings.weight in"),
        ({"tie_word_embeddings": True}, "has a head of its own"),
        ({"model_type": "qwen2"}, "lacks 4 tensors of its model, the first is decoder.layers.0.self_attention.linear_qkv.bias"),
        ({"model_type": "mystery"}, "'mystery' is not supported"),
        ({"num_key_value_heads": 4}, "linear_qkv.weight in"),
    ],
)
def test_the_config_of_another_model(llama, changes, said):
    assert said in refused(llama[1], {**llama[0].config, **changes})


@pytest.mark.parametrize(
    "file, harm",
    [(file, harm) for file in (".metadata", "__0_0.distcp") for harm in ("missing", "cut", "zeros")] + [("__0_0.distcp", "bit")],
)
def test_damage_is_named(llama, tmp_path, file, harm):
    damaged = shutil.copytree(llama[1], tmp_path / "damaged") / file
    content = bytearray(damaged.read_bytes())
    if harm == "bit":  # of a number: torch.load would take it for another number
        content[content.find(bytes(llama[0].get("model.norm.weight")[:8].view(torch.uint8).numpy()))] ^= 1
    damaged.write_bytes({"cut": content[: len(content) // 2], "zeros": bytes(len(content))}.get(harm, content))
    if harm == "missing":
        damaged.unlink()
    assert f"the checkpoint {tmp_path / 'damaged'} is damaged" in refused(tmp_path / "damaged", llama[0].config)


def test_a_part_that_is_missing(llama, tmp_path):
    """The metadata of a checkpoint that lacks a rank's file may lack its pieces, too."""
    held, tensors = llama[0], megatron_keys(llama[0], stacked=True, halves=False)

    class Forgetful(Planner):
        def items(self):
            yield from (item for n, item in enumerate(super().items()) if n != 4)

    planner, writer = Forgetful(tensors, 3), FileSystemWriter(tmp_path)
    plans, metadata = planner.create_global_plan([SavePlan(list(planner.items()))])
    [plan] = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    assert "it lacks a part of" in refused(tmp_path, held.config)

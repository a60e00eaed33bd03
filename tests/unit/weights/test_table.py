"""Names, shapes and bits between Hugging Face and Megatron, for every family."""

import json

import pytest
import torch

from megatron_nft.errors import UserError
from megatron_nft.weights import load_huggingface, padded_vocab_size, table_for
from tests.support import VOCAB, as_in_files, tiny_model

# 8 heads and 4 key-value heads, so that 1, 2 and 4 tensor-parallel ranks are possible with more than one query head a group
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MODELS = {
    "qwen2 tied": ("qwen2", True, {}),
    "qwen2 untied": ("qwen2", False, {}),
    "llama tied": ("llama", True, {}),
    "llama untied": ("llama", False, {}),
    "mistral": ("mistral", False, {}),
    "qwen3": ("qwen3", False, {}),
    "qwen3 experts": ("qwen3_moe", True, {}),
    "llama wide heads": ("llama", False, {"head_dim": 6}),  # hidden / heads is 4
}


@pytest.fixture(scope="module", params=MODELS)
def directory(request, tmp_path_factory):
    family, tie, changes = MODELS[request.param]
    return tiny_model(tmp_path_factory.mktemp("model"), family, tie, **HEADS, **changes)


def state_dict(directory) -> dict[str, torch.Tensor]:
    """What transformers makes of the directory, without a tied head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    state = dict(as_in_files(model.state_dict().items()))
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def test_names_and_shapes_are_those_of_transformers(directory):
    state = state_dict(directory)
    source = load_huggingface(directory)
    assert source.table.hf_shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert source.shapes() == source.table.hf_shapes()
    assert source.names() == list(source.table.hf_shapes())
    for name, tensor in state.items():
        assert torch.equal(source.get(name), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_there_and_back_is_bit_identical(directory, dtype, tp):
    """Fuse, pad, cut; and back. Each rank's slices have equal shapes, cut from the full tensor or made of the parts at once."""
    source = load_huggingface(directory)
    table, seen = source.table, []
    for name in table.megatron_names():
        full = table.to_megatron(name, lambda hf: source.get(hf).to(dtype))
        shards = [table.shard(name, full, rank, tp) for rank in range(tp)]
        assert len({shard.shape for shard in shards}) == 1, name
        direct = [table.to_megatron(name, lambda hf: source.get(hf).to(dtype), rank, tp) for rank in range(tp)]
        assert all(torch.equal(a, b) for a, b in zip(shards, direct, strict=True)), name
        for hf, tensor in table.to_hf(name, table.unshard(name, [shard.clone() for shard in shards])):
            assert tensor.dtype == dtype
            assert torch.equal(tensor, source.get(hf).to(dtype)), hf
            seen.append(hf)
    assert seen == source.names()


def config(**changes) -> dict:
    return {
        "model_type": "qwen2",
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 5,
        **changes,
    }


def test_query_key_value_order():
    """Head size 2, 4 query heads, 2 groups: group by group its two query heads, its key, its value; written out by hand."""
    table = table_for(config())
    rows = {"q": range(0, 8), "k": range(100, 104), "v": range(200, 204)}
    tensors = {f"model.layers.1.self_attn.{letter}_proj.bias": torch.tensor(list(values)) for letter, values in rows.items()}
    name = "decoder.layers.1.self_attention.linear_qkv.bias"
    full = table.to_megatron(name, tensors.__getitem__)
    first, second = [0, 1, 2, 3, 100, 101, 200, 201], [4, 5, 6, 7, 102, 103, 202, 203]
    assert full.tolist() == first + second
    assert [table.shard(name, full, rank, 2).tolist() for rank in (0, 1)] == [first, second]
    weight = "decoder.layers.1.self_attention.linear_qkv.weight"
    columns = {hf.replace("bias", "weight"): tensor[:, None].repeat(1, 8) for hf, tensor in tensors.items()}
    assert table.to_megatron(weight, columns.__getitem__)[:, 3].tolist() == first + second


def test_gate_and_up_order():
    """Each rank: its gate rows over its up rows."""
    table, name = table_for(config()), "decoder.layers.0.mlp.linear_fc1.weight"
    full = table.to_megatron(name, lambda hf: torch.tensor([0, 1, 2, 3])[:, None] + (10 if "up" in hf else 0))
    assert full[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert [table.shard(name, full, rank, 2)[:, 0].tolist() for rank in (0, 1)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_rows_and_columns_are_cut_where_the_layer_is_parallel():
    table = table_for(config())
    for name, full in (("mlp.linear_fc2", torch.arange(32).reshape(8, 4)), ("self_attention.linear_proj", torch.arange(64).reshape(8, 8))):
        half = full.shape[1] // 2
        assert torch.equal(table.shard(f"decoder.layers.0.{name}.weight", full, 1, 2), full[:, half:])
    norm = torch.arange(8)
    assert torch.equal(table.shard("decoder.layers.0.input_layernorm.weight", norm, 1, 2), norm)


@pytest.mark.parametrize("tp, padded", [(1, 101), (2, 102), (4, 104)])
def test_vocabulary_is_padded_with_zeros_at_the_end(tp, padded):
    table = table_for(config(vocab_size=VOCAB, num_attention_heads=8, num_key_value_heads=4))
    full = torch.arange(1.0, VOCAB + 1)[:, None].repeat(1, 8)
    shards = [table.shard("output_layer.weight", full, rank, tp) for rank in range(tp)]
    assert padded_vocab_size(VOCAB, tp) == padded and [len(shard) for shard in shards] == [padded // tp] * tp
    assert torch.cat(shards)[:, 0].tolist() == [*range(1, VOCAB + 1), *[0] * (padded - VOCAB)]


def test_more_ranks_than_rows_of_vocabulary():
    """Ranks that hold padding only."""
    table = table_for(config(vocab_size=5, num_attention_heads=4, num_key_value_heads=4))
    full = torch.arange(1.0, 6)[:, None].repeat(1, 8)
    shards = [table.shard("output_layer.weight", full, rank, 4) for rank in range(4)]
    assert [shard[:, 0].tolist() for shard in shards] == [[1, 2], [3, 4], [5, 0], [0, 0]]
    assert torch.equal(table.unshard("output_layer.weight", shards), full)


def test_other_names_of_the_same_tensor():
    """Transformer Engine's norms, and the last pipeline stage's copy of a tied embedding."""
    table = table_for(config(tie_word_embeddings=True))
    layer = "decoder.layers.1."
    assert table.canonical(layer + "self_attention.linear_qkv.layer_norm_weight") == layer + "input_layernorm.weight"
    assert table.canonical(layer + "mlp.linear_fc1.layer_norm_weight") == layer + "pre_mlp_layernorm.weight"
    assert table.canonical("output_layer.weight") == "embedding.word_embeddings.weight"
    assert table_for(config()).canonical("output_layer.weight") == "output_layer.weight"
    with pytest.raises(ValueError, match="decoder.layers.2.input_layernorm.weight"):
        table.canonical("decoder.layers.2.input_layernorm.weight")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": None}, "None is not supported"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"vocab_size": "5"}, "vocab_size in config.json is '5'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads (3)"),
        ({"hidden_size": 10}, "hidden_size in config.json (10)"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral"}, "sliding_window in config.json is 4096"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window in config.json is 128"),
    ],
)
def test_configs_without_a_table(changes, said):
    with pytest.raises(UserError) as error:
        table_for(json.loads(json.dumps(config(**changes))))
    assert said in str(error.value)


def test_tensor_parallel_sizes_that_do_not_divide():
    table = table_for(config())
    with pytest.raises(UserError, match=r"num_attention_heads \(4\) cannot be divided by tensor_model_parallel_size \(3\).*1, 2"):
        table.check_tensor_parallel(3)
    with pytest.raises(UserError, match=r"num_key_value_heads \(2\)"):
        table.shard("output_layer.weight", torch.zeros(5, 8), 0, 4)

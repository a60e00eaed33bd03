"""The planner's bytes against closed forms and published figures. Against Megatron's own on tiny models: test_holdings."""

import dataclasses
from math import lcm, prod

import numpy as np
import pytest

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.planner import activations, engine_memory, parameters
from megatron_nft.planner.buffers import Buffer
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.planner.hardware import GIB
from megatron_nft.planner.holdings import Stage
from megatron_nft.planner.memory import PHASES, checkpoint_bytes, memory
from megatron_nft.planner.parameters import Parameter
from megatron_nft.planner.weight_stream import stream
from megatron_nft.weights import table_for
from tests.unit.planner.holdings_worker import configured

QWEN_32B = {  # Qwen/Qwen2.5-32B's config.json
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
QWEN_7B = QWEN_32B | {  # Qwen/Qwen2.5-Math-7B's
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
}
QWEN_30B_A3B = {  # Qwen/Qwen3-30B-A3B's
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
LLAMA_8B = {  # meta-llama/Meta-Llama-3-8B's
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
GPT = QWEN_32B | {  # an MLP of three matrices with as many inner values as the two of four times the hidden size
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
}
TP8 = {"parallel.tensor_model_parallel_size": 8, "parallel.sequence_parallel": True}
TP4_PP2_CP2 = {
    "parallel.tensor_model_parallel_size": 4,
    "parallel.sequence_parallel": True,
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.context_parallel_size": 2,
}
LONG = {"rollout.max_tokens": 16384, "data.max_prompt_length": 2048, "train.tokens_per_micro_batch": 18432}


def settings(nodes: int = 16, **more) -> Config:
    return configured({"plan.nodes": nodes, "train.recompute_granularity": "full", "rollout.tensor_parallel_size": 4, **LONG, **more})


def planned(hf: dict = QWEN_32B, nodes: int = 16, **more):
    config = settings(nodes, **more)
    return memory(config, hf, Cluster.of(config))


def used(found, phase: str) -> int:
    return sum(found.phases[phase].values())


# ---- parameters


@pytest.mark.parametrize("hf, published", [(QWEN_32B, 32_763_876_352), (QWEN_7B, 7_615_616_512), (QWEN_30B_A3B, 30_532_122_624)])
def test_parameters_are_those_of_the_published_files(hf, published):
    """total_size / 2 in model.safetensors.index.json."""
    assert parameters.total(hf) == published


def test_32b_over_8_x_16_gpus():
    """Every size is a multiple of a bucket's 128: no padding, so that each rank owns a sixteenth of every bucket."""
    layer = 5120 * (5120 + 2 * 1024) + 7168 + 5120 * 5120 + 3 * 27648 * 5120
    rank = (64 * layer + 2 * 152064 * 5120) // 8 + (2 * 64 + 1) * 5120
    train = planned(**TP8).phases["train"]
    assert (train["weights"], train["gradients"], train["optimizer"]) == (2 * rank, 4 * rank, 12 * rank // 16)
    assert [round(train[part] / 1e9, 1) for part in ("weights", "gradients", "optimizer")] == [8.2, 16.4, 3.1]


@pytest.mark.parametrize(
    "more, weights, state",
    [
        ({}, 6, 12),  # bf16 weights and fp32 gradients, of the distributed optimizer's documentation in Megatron Core's guide
        ({"model.precision": "fp32"}, 8, 8),
        ({"megatron.ddp": {"grad_reduce_in_fp32": False}}, 4, 12),
        ({"optimizer.use_precision_aware_optimizer": True}, 6, 2 + 4 + 4),
        ({"optimizer.use_precision_aware_optimizer": True, "optimizer.exp_avg_dtype": "bf16", "optimizer.exp_avg_sq_dtype": "fp8"}, 6, 5),
        ({"optimizer.use_precision_aware_optimizer": True, "megatron.optimizer": {"store_param_remainders": False}}, 6, 12),
    ],
)
def test_bytes_of_a_parameter(more, weights, state):
    config, layout = settings(**more), Layout(8, 1, 1, 16, 1, 1, 8, True)
    [stage] = Stage.all(QWEN_32B, config, layout)
    held = stage.fullest
    assert (held.weights + held.gradients, held.optimizer) == (weights * stage.numel, state * stage.numel // 16)


def test_fp8_parameters_have_a_byte():
    config = settings(**{"model.fp8": "hybrid", "model.fp8_param_gather": True, "model.first_last_layers_bf16": True})
    [stage] = Stage.all(QWEN_32B, config, Layout(8, 1, 1, 16, 1, 1, 8, True))
    linear = 62 * (5120 * 2 * (5120 + 1024) + 3 * 27648 * 5120) // 8  # of all layers but the first and last
    assert stage.fullest.weights == 2 * stage.numel - linear
    assert stage.fullest.gradients == 4 * stage.numel


def test_experts_lie_on_few_ranks():
    layout = Layout(4, 1, 1, 4, 1, 8, 1, True)
    [stage] = Stage.all(QWEN_30B_A3B, settings(), layout)
    experts = 48 * 16 * 3 * 768 * 2048
    assert sum(p.numel for [*chunk] in stage.chunks for p in chunk if p.expert) == experts
    assert stage.fullest.optimizer == 12 * experts // 2 + 12 * (stage.numel - experts) // 4  # two ranks share an expert, four the rest


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_all_ranks_are_the_whole(seed):
    """Every element of every parameter has one owner, however the buckets are cut."""
    random = np.random.default_rng(seed)
    held = tuple(Parameter(str(n), int(size), alone=n in (3, 7)) for n, size in enumerate(random.integers(1, 900, 12)))
    buffer = Buffer(held, ranks=int(random.integers(1, 9)), bucket_size=[None, 1000][seed % 2], itemsize=2, gradient_itemsize=4)
    pieces = [sum(buffer.pieces(rank)) for rank in range(buffer.ranks)]
    assert pieces == buffer.owned().tolist() and sum(pieces) == sum(parameter.numel for parameter in held)
    assert sum(buffer.buckets) == buffer.numel and not any(size % lcm(128, buffer.ranks) for size in buffer.buckets)


def test_state_on_the_host_leaves_the_gpu():
    on = {"optimizer.optimizer_cpu_offload": True, "optimizer.use_precision_aware_optimizer": True}
    here, there = planned(**TP8), planned(**TP8, **on)
    assert "optimizer" not in there.phases["train"]
    assert there.host["updated on the host"] == 8 * here.phases["train"]["optimizer"] * 16 // 12


# ---- activations


def micro(hf: dict, layout: Layout, tokens: int, **more) -> activations.Micro:
    return activations.Micro(table_for(hf), settings(**{"train.recompute_granularity": None, **more}), layout, tokens)


def scores(tokens: int, tp: int) -> int:
    """Flash attention's softmax sums and the norms' numbers, float32, which arXiv 2205.05198 leaves out."""
    return 4 * tokens * 12 // tp + 2 * 4 * tokens


@pytest.mark.parametrize("tp, sequence, each", [(1, False, 34), (4, True, 34 / 4), (4, False, 10 + 24 / 4)])
def test_a_layer_keeps_what_the_paper_says(tp, sequence, each):
    """arXiv 2205.05198, table 2 without its attention term: 34 s b h in bf16, of which two dropout masks of s b h are not kept here, as
    there is no dropout."""
    tokens, layout = 1024, Layout(tp, 1, 1, 1, 1, 1, tp, sequence)
    masks = 2 / tp if sequence else 2
    own = tokens // tp if sequence else tokens
    statistics = scores(tokens, tp) - 8 * (tokens - own)
    assert micro(GPT, layout, tokens).kept(0) == (each - masks) * tokens * 1536 + statistics


def test_recomputed_layers_keep_their_input():
    layout = Layout(1, 4, 1, 1, 1, 1, 1, False)
    full = {"train.recompute_granularity": "full"}
    stages = Stage.all(GPT, settings(), layout)
    residual = 2 * 1024 * 1536
    for stage in stages:  # 4 layers a stage; one output for each micro-batch in flight
        assert activations.kept(micro(GPT, layout, 1024, **full), stage) == (4 - stage.number) * (4 + 1) * residual
    two = micro(GPT, layout, 1024, **full, **{"train.recompute_num_layers": 2})
    assert activations.kept(two, stages[0]) == 4 * (2 + 1) * residual
    block = micro(GPT, layout, 1024, **full, **{"train.recompute_num_layers": 3, "train.recompute_method": "block"})
    assert activations.kept(block, stages[3]) == (3 + 1) * residual + block.kept(0)


def test_an_interleaved_pipeline_keeps_a_little_more():
    """arXiv 2205.05198, section 4.2.3: the first stage keeps L (1 + (p - 1) / (p m)) layers' activations."""
    layout, p, m = Layout(1, 4, 1, 1, 2, 1, 1, False), 4, 2
    one, stage = micro(GPT, layout, 1024), Stage.all(GPT, settings(), layout)[0]
    outputs = activations.in_flight(layout, 0) * 2 * 1024 * 1536
    assert activations.kept(one, stage) - outputs == 16 * (1 + (p - 1) / (p * m)) * one.kept(0)


@pytest.mark.parametrize(
    "hf, modules, saved",
    [
        (GPT, ["core_attn"], lambda m: 4 * 1024 * 12),
        (GPT, ["layernorm"], lambda m: 0),  # in one module with the weight behind it
        (GPT, ["mlp"], lambda m: m.residual + 2 * 1024 * 3 * 4096),
        (QWEN_30B_A3B, ["layernorm"], lambda m: m.residual),
        (QWEN_30B_A3B, ["moe_act"], lambda m: 2 * 8 * 1024 * 768),
        (QWEN_30B_A3B, ["moe"], lambda m: 2 * 4 * 1024 * 128 + 2 * 8 * 1024 * (2048 + 3 * 768)),
    ],
)
def test_recomputed_modules_are_not_kept(hf, modules, saved):
    layout = Layout(1, 1, 1, 1, 1, 1, 1, False)
    plain = micro(hf, layout, 1024)
    again = micro(hf, layout, 1024, **{"train.recompute_granularity": "selective", "train.recompute_modules": modules})
    assert plain.kept(0) - again.kept(0) == saved(plain)


def test_context_parallel_ranks_share_a_micro_batch():
    alone, shared = (micro(QWEN_32B, Layout(4, 1, cp, 1, 1, 1, 4, True), 8192 * cp) for cp in (1, 2))
    assert alone.kept(0) == shared.kept(0)


def test_the_head_never_holds_all_logits():
    one = micro(QWEN_32B, Layout(8, 1, 1, 1, 1, 1, 8, True), 2**17)
    assert one.chunk(backward=False) < 2**29 * 17 // 16 < 2**17 * 152064 // 8 * 4
    assert one.chunk(backward=True) - one.chunk(backward=False) == pytest.approx(2**28 + 8 * 152064 // 8 * 5120, rel=1e-3)


# ---- engine


@pytest.mark.parametrize(
    "more, nbytes",
    [
        ({"rollout.tensor_parallel_size": 1}, 262_144),  # 32 GiB for 131,072 tokens, as published for QwQ-32B, the same architecture
        ({"rollout.tensor_parallel_size": 4}, 65_536),
        ({"rollout.tensor_parallel_size": 4, "rollout.kv_cache_dtype": "fp8"}, 32_768),
        ({"rollout.tensor_parallel_size": 40 // 5}, 32_768),
    ],
)
def test_bytes_of_a_cached_token(more, nbytes):
    assert engine_memory.token_bytes(QWEN_32B, settings(**more)) == nbytes


def test_key_value_heads_are_repeated_on_more_gpus_than_there_are_heads():
    four, eight = (engine_memory.token_bytes(QWEN_30B_A3B, settings(**{"rollout.tensor_parallel_size": tp})) for tp in (4, 8))
    assert four == eight == 2 * 48 * 128 * 2


@pytest.mark.parametrize("hf", [QWEN_32B, QWEN_7B, QWEN_30B_A3B])
def test_weights_of_an_engine(hf):
    """All of them in bf16 on one GPU (these vocabularies are multiples of 64); in FP8 half of the linear layers'."""
    alone = {"rollout.tensor_parallel_size": 1}
    linear = sum(prod(shape) for name, shape in table_for(hf).hf_shapes().items() if name.endswith("proj.weight"))
    assert engine_memory.weights(hf, settings(**alone)) == 2 * parameters.total(hf)
    assert engine_memory.weights(hf, settings(**alone, **{"rollout.quantization": "fp8"})) == 2 * parameters.total(hf) - linear


@pytest.mark.parametrize(
    "hf, tp, logged",
    [(LLAMA_8B, 1, 14.96), (LLAMA_8B, 2, 7.48), (QWEN_32B, 2, 30.71)],  # vllm-project/vllm: pull request 10511, issue 15815
)
def test_weights_are_what_vllm_logs(hf, tp, logged):
    """In GiB: "model weights take", which has what the allocator rounds up in it."""
    found = engine_memory.weights(hf, settings(**{"rollout.tensor_parallel_size": tp})) / GIB
    assert 0.993 * logged < found < logged + 0.005


def test_blocks_are_what_vllm_logs():
    """vllm-project/vllm issue 15815: Qwen2.5-32B on two GPUs, 7.71 GiB for the KV cache, 3947 blocks of 16 tokens."""
    block = 16 * engine_memory.token_bytes(QWEN_32B, settings(**{"rollout.tensor_parallel_size": 2}))
    assert 7.705 * GIB // block <= 3947 <= 7.715 * GIB // block


def test_an_engine_has_its_share_of_the_gpu():
    found = planned(**TP8, **{"rollout.gpu_memory_utilization": 0.6})
    parts = {name: nbytes for name, nbytes in found.phases["generate"].items() if name not in ("weights", "optimizer", "NCCL and CUDA")}
    assert sum(parts.values()) == pytest.approx(0.6 * found.limit, abs=16 * 65_536)
    assert found.kv_tokens * 65_536 == parts["KV cache"] and found.kv_tokens % 16 == 0
    assert planned(**TP8, **{"rollout.enforce_eager": True}).kv_tokens - planned(**TP8).kv_tokens == GIB // 65_536


# ---- phases


def test_what_leaves_the_gpu_is_not_there_while_answers_are_written():
    parts = {
        level: {"weights", "gradients", "optimizer"} & planned(**TP8, **{"train.offload": level}).phases["generate"].keys()
        for level in ("none", "gradients", "optimizer", "all", None)
    }
    assert parts["none"] == {"weights", "gradients", "optimizer"}
    assert parts["gradients"] == parts[None] == {"weights", "optimizer"}
    assert parts["optimizer"] == {"weights"} and parts["all"] == set()


def test_what_is_offloaded_lies_on_the_host():
    train = planned(**TP8).phases["train"]
    assert "offloaded" not in planned(**TP8).host
    assert planned(**TP8, **{"train.offload": "optimizer"}).host["offloaded"] == 8 * train["optimizer"]
    assert planned(**TP8, **{"train.offload": "all"}).host["offloaded"] == 8 * (train["optimizer"] + train["weights"])


def test_a_save_is_staged_whole_on_every_rank():
    """float32 weights and moments, and the bf16 weights."""
    found = planned(**TP8)
    assert found.host["staged for a save"] == 8 * 14 * found.phases["train"]["weights"] // 2


def test_a_stage_without_buckets_is_gathered_at_once_for_a_save():
    """Megatron cuts only the first stage's buffer into buckets."""
    stages = Stage.all(QWEN_32B, settings(), Layout(4, 2, 2, 8, 1, 1, 4, True))
    gathered = planned(**TP4_PP2_CP2).phases["save"]["gathered for the save"]
    assert gathered == 4 * stages[1].numel * (1 + 1 / 16)
    assert planned(**TP8).phases["save"]["gathered for the save"] < 2 * GIB


def test_the_stream_holds_the_largest_tensor():
    """The embedding, its slices gathered, and one rank's slice."""
    config = settings(**TP8)
    found = stream(QWEN_32B, config, Layout(8, 1, 1, 16, 1, 1, 8, True))
    largest = 2 * 152064 * 5120
    assert found.bytes == 2 * parameters.total(QWEN_32B)
    assert 2 * largest + largest // 8 <= found.peak <= 2 * largest + largest // 8 + largest


def test_the_largest_micro_batch_is_the_largest():
    found = planned(**TP8, **{"train.recompute_granularity": None})
    assert found.largest_micro_batch >= 18432 and used(found, "train") <= found.limit
    fits = planned(**TP8, **{"train.recompute_granularity": None, "train.tokens_per_micro_batch": found.largest_micro_batch})
    above = planned(**TP8, **{"train.recompute_granularity": None, "train.tokens_per_micro_batch": found.largest_micro_batch + 128})
    assert not {"train", "old_logprobs"} & fits.over.keys()
    assert above.over.keys() >= {"train"}


def test_the_longest_response():
    tight = planned(**TP8, **{"train.recompute_granularity": None})
    assert tight.longest_response == tight.largest_micro_batch - 2048
    small = planned(QWEN_7B, 4, **{"rollout.tensor_parallel_size": 1, "rollout.gpu_memory_utilization": 0.4})
    assert small.longest_response == 4096 - 2048  # the model's window


def test_it_fits_or_it_does_not():
    assert planned(**TP8, **{"rollout.gpu_memory_utilization": 0.6}).fits
    alone = planned(nodes=1, **{"rollout.gpu_memory_utilization": 0.9})  # 32B without parallelism
    assert not alone.fits and alone.over.keys() == set(PHASES)
    assert alone.largest_micro_batch == alone.longest_response == 0
    starved = planned(**TP8, **{"rollout.gpu_memory_utilization": 0.24})
    assert not starved.over and starved.kv_tokens < starved.window and not starved.fits


def test_servers_have_gpus_of_their_own():
    served = {"rollout.mode": "served", "rollout.gpu_memory_utilization": 0.85}
    config = settings(**TP8, **served)
    config.rollout.served.count = 8
    found = memory(config, QWEN_32B, Cluster.of(config))
    assert not any(name.startswith(("vLLM", "KV")) for parts in found.phases.values() for name in parts)
    assert found.servers["KV cache"] == found.kv_tokens * 65_536 and planned(**TP8).servers == {}
    assert used(found, "generate") < used(planned(**TP8), "generate")


@pytest.mark.parametrize("hf, more", [(QWEN_30B_A3B, {}), (QWEN_30B_A3B, {"rollout.tensor_parallel_size": 8}), (QWEN_7B, {})])
def test_more_models_are_planned(hf, more):
    experts = {"parallel.expert_model_parallel_size": 8, "parallel.expert_tensor_parallel_size": 1} if "num_experts" in hf else {}
    found = planned(hf, 2, **{**TP8, "parallel.tensor_model_parallel_size": 4}, **experts, **more)
    assert found.phases.keys() == set(PHASES)
    assert all(isinstance(nbytes, int) and nbytes > 0 for parts in found.phases.values() for nbytes in parts.values())


def test_checkpoints():
    config = settings(**TP8)
    config.checkpoint.keep, config.checkpoint.keep_best = 2, 1
    found = checkpoint_bytes(config, QWEN_32B)
    assert found["weights"] == 2 * 32_763_876_352 and found["checkpoint"] == 14 * 32_763_876_352
    assert found["disk"] == 4 * found["checkpoint"]  # the new one is written before an old one goes


# ---- errors


@pytest.mark.parametrize(
    "more, said",
    [
        ({"parallel.tensor_model_parallel_size": 16, "parallel.sequence_parallel": True}, r"attention heads \(40\)"),
        ({"parallel.pipeline_model_parallel_size": 3}, "16|128"),
        ({"parallel.pipeline_model_parallel_size": 4, "parallel.virtual_pipeline_model_parallel_size": 32}, r"layers \(64\)"),
        ({"parallel.expert_model_parallel_size": 2}, "no experts"),
        ({"rollout.tensor_parallel_size": 16}, r"attention heads \(40\).*rollout.tensor_parallel_size"),
        ({**TP8, "train.tokens_per_micro_batch": 18433}, "train.tokens_per_micro_batch"),
        ({"megatron.transformer": {"num_layers_in_first_pipeline_stage": 3}}, "num_layers_in_first_pipeline_stage"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_in_a_line(more, said):
    with pytest.raises(UserError, match=said) as caught:
        planned(**more)
    assert "\n" not in str(caught.value)


def test_memory_is_of_plain_values():
    assert all(isinstance(value, (int, float)) for value in planned(**TP8).facts.values())
    assert dataclasses.asdict(planned(**TP8))["limit"] == int(0.988 * 80 * GIB)

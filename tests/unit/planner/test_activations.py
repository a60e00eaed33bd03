"""Activations against arXiv 2205.05198's formulas."""

import pytest

from megatron_nft.planner import activations
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.holdings import Stage
from megatron_nft.weights import table_for
from tests.unit.planner.published import GPT, QWEN_30B_A3B, QWEN_32B, settings


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

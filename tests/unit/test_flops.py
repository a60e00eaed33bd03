"""Operation counts against a second way: every matrix of a real layer, and attention pair by pair."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_nft.flops import attention_cost, attention_flops, linear_flops

SMALL = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24, intermediate_size=160, vocab_size=500
)
MIXTURE = SMALL | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)


def weights_of(model, skip=("embed", "norm", "bias")) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if not any(word in name for word in skip)}


def test_linear_flops_are_two_for_each_weight_of_a_model():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SMALL, tie_word_embeddings=False))
    assert linear_flops(SMALL) == 2 * sum(weights_of(model).values())


def test_of_experts_only_those_a_token_is_sent_to_count():
    hf = AutoConfig.for_model("qwen3_moe", **MIXTURE, tie_word_embeddings=False, decoder_sparse_step=1, mlp_only_layers=[])
    weights = weights_of(AutoModelForCausalLM.from_config(hf))
    experts = sum(n for name, n in weights.items() if ".experts." in name)
    assert experts == 3 * 8 * 3 * 64 * 48
    assert linear_flops(MIXTURE) == 2 * (sum(weights.values()) - experts + experts * 2 // 8)


def test_attention_flops_are_those_of_the_pairs_under_a_causal_mask():
    n = 1000
    pairs = n * (n + 1) // 2  # a multiplication and an addition for each channel, of the score and of the weighted value
    assert n * n * attention_flops(SMALL) == pytest.approx(3 * 4 * 24 * 2 * 2 * pairs, rel=2 / n)


def test_attention_cost_of_a_published_model():
    """Qwen2.5 7B: at 14,336 tokens attention is a fifth of the linear layers."""
    hf = dict(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064
    )
    assert attention_cost(hf) * 14_336 == pytest.approx(0.2035, abs=5e-4)

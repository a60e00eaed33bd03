"""Floating-point operations of a forward pass, from a Hugging Face config.json."""

from megatron_nft.weights.layouts import Sizes


def linear_flops(hf: dict) -> int:
    """Of one token in all weight matrices: 2 for each weight it meets (of experts only those it is sent to), output layer included,
    embedding not."""
    sizes = Sizes.of(hf)
    attention = sizes.hidden * sizes.head * (2 * sizes.heads + 2 * sizes.groups)  # query and output; key and value
    return 2 * (sizes.layers * (attention + _mlp_weights(hf, sizes)) + sizes.vocabulary * sizes.hidden)


def attention_flops(hf: dict) -> int:
    """Of one token in all layers' attention, for each token of its sequence: scores and weighted values are 2 operations each for every
    pair and channel, and under the causal mask a token sees half of its sequence on average: 2 x heads x head dimension x layers."""
    sizes = Sizes.of(hf)
    return 2 * sizes.layers * sizes.heads * sizes.head


def attention_cost(hf: dict) -> float:
    """k of the cost n + k n^2 of a sequence of n tokens, whose unit is one token in the linear layers. It holds for the backward pass,
    too, where both parts cost twice as much. 1.0e-5 for Qwen2.5 32B, 1.4e-5 for 7B, 2.8e-5 for 1.5B."""
    return attention_flops(hf) / linear_flops(hf)


def _mlp_weights(hf: dict, sizes: Sizes) -> int:
    """Gate, up and down of the MLP, or of the experts a token is sent to and the router."""
    if not sizes.experts:
        return 3 * sizes.hidden * sizes.ffn
    return 3 * sizes.hidden * sizes.expert_ffn * hf["num_experts_per_tok"] + sizes.hidden * sizes.experts

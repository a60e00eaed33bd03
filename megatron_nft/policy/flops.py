"""Floating-point operations of a forward pass, from a Hugging Face config.json. Needs neither torch nor Megatron-Core."""


def linear_flops(hf: dict) -> int:
    """Of one token in all weight matrices: 2 for each weight it meets (of experts only those it is sent to), output layer included,
    embedding not."""
    per_layer = _attention_weights(hf) + _mlp_weights(hf)
    return 2 * (hf["num_hidden_layers"] * per_layer + hf["vocab_size"] * hf["hidden_size"])


def attention_flops(hf: dict) -> int:
    """Of one token in all layers' attention, for each token of its sequence: scores and weighted values are 2 operations each for every
    pair and channel, and under the causal mask a token sees half of its sequence on average: 2 x heads x head dimension x layers."""
    return 2 * hf["num_hidden_layers"] * hf["num_attention_heads"] * _head_dim(hf)


def attention_cost(hf: dict) -> float:
    """k of the cost n + k n^2 of a sequence of n tokens, whose unit is one token in the linear layers. It holds for the backward pass,
    too, where both parts cost twice as much. 1.0e-5 for Qwen2.5 32B, 1.4e-5 for 7B, 2.8e-5 for 1.5B."""
    return attention_flops(hf) / linear_flops(hf)


def _head_dim(hf: dict) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def _attention_weights(hf: dict) -> int:
    heads = hf["num_attention_heads"]
    key_value_heads = hf.get("num_key_value_heads") or heads
    return hf["hidden_size"] * _head_dim(hf) * (2 * heads + 2 * key_value_heads)  # query and output; key and value


def _mlp_weights(hf: dict) -> int:
    """Gate, up and down of the MLP, or of the experts a token is sent to and the router."""
    hidden = hf["hidden_size"]
    if not hf.get("num_experts"):
        return 3 * hidden * hf["intermediate_size"]
    return 3 * hidden * hf["moe_intermediate_size"] * hf["num_experts_per_tok"] + hidden * hf["num_experts"]

"""Layouts that a model does not fit: one line, before anything is allocated."""

import re

import pytest

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.sizes import check_layout

DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
}
EXPERTS = {**DENSE, "model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
TP, PP, VPP, CP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
SP = "sequence_parallel"


def check(model: dict, tokens: int = 4096, **parallel) -> None:
    config = Config(run_dir="unused")
    config.train.tokens_per_micro_batch = tokens
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    check_layout(model, config)


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        (DENSE, {TP: 4, PP: 4, VPP: 2, CP: 2, SP: True}),
        (DENSE, {PP: 8}),
        (EXPERTS, {TP: 4, SP: True, EP: 3, ETP: 2}),
        (EXPERTS, {EP: 6, PP: 2, VPP: 4}),
        (DENSE, {CP: 2, "tokens": 4}),
    ],
)
def test_layouts_that_fit(model, parallel):
    check(model, **parallel)


@pytest.mark.parametrize(
    ("model", "parallel", "problem", "mend"),
    [
        (DENSE, {TP: 3}, r"attention heads \(8\) cannot be divided by parallel.tensor_model_parallel_size \(3\)", r"\[1, 2, 4, 8\]"),
        (DENSE, {TP: 8}, r"key-value heads \(4\)", r"\[1, 2, 4\]"),
        (DENSE, {PP: 3}, r"layers \(8\) cannot be divided by parallel.pipeline_model_parallel_size \(3\)", r"\[1, 2, 4, 8\]"),
        (DENSE, {PP: 4, VPP: 4}, r"layers \(8\) .* parallel.pipeline_\w+ x virtual_pipeline_model_parallel_size \(16\)", r"\[1, 2, 4, 8\]"),
        (DENSE, {EP: 2}, "parallel.expert_model_parallel_size is 2, and the model has no experts", "leave it out"),
        (DENSE, {ETP: 2}, "parallel.expert_tensor_parallel_size is 2, and the model has no experts", "leave it out"),
        (EXPERTS, {EP: 4}, r"num_experts \(6\) cannot be divided by expert_model_parallel_size \(4\)", "1, 2, 3, 6"),
        (EXPERTS, {EP: 2, ETP: 3}, r"moe_intermediate_size \(32\) .* expert_tensor_parallel_size \(3\)", "1, 2, 4, 8, 16, 32"),
        (EXPERTS, {TP: 2}, "experts, and .* without sequence_parallel", "parallel.sequence_parallel=true"),
        (DENSE, {CP: 4, "tokens": 4100}, r"tokens_per_micro_batch \(4100\) cannot be divided by 2 x context_\w+ \(4\)", "e.g. 4104"),
        (DENSE, {CP: 4, "tokens": 6}, r"tokens_per_micro_batch \(6\)", "multiple of 8"),
        (DENSE, {TP: 2, SP: True, "tokens": 63}, r"\(63\) cannot be divided by tensor_\w+ \(2\) with sequence_parallel", "e.g. 64"),
        (DENSE, {TP: 4, CP: 2, SP: True, "tokens": 60}, r"\(60\) .* and context_\w+ x tensor_\w+ \(2 x 4\) with", "multiple of 8"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit(model, parallel, problem, mend):
    with pytest.raises(UserError, match=problem) as caught:
        check(model, **parallel)
    assert re.search(mend, caught.value.mend)

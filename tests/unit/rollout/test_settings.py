from types import SimpleNamespace

import pytest
import torch

from megatron_nft.rollout.settings import leave_alone, rounds_head


@pytest.mark.parametrize(
    ("weight", "processor", "rounded"),
    [
        (torch.bfloat16, {"head_dtype": torch.float32}, False),
        (torch.bfloat16, {"head_dtype": torch.bfloat16}, True),
        (torch.bfloat16, {}, True),  # a version that does not know it
        (torch.float32, {}, False),
    ],
)
def test_rounded_logits_are_told(weight, processor, rounded):
    head = SimpleNamespace(weight=torch.zeros(2, 2, dtype=weight))
    assert rounds_head(SimpleNamespace(logits_processor=SimpleNamespace(**processor), lm_head=head)) is rounded


class _Live:
    """vLLM 0.32's runner: looks the number up."""

    dp_size = property(lambda self: self.parallel_config.data_parallel_size)
    parallel_config = SimpleNamespace(data_parallel_size=1)


@pytest.mark.parametrize(
    "runner", [SimpleNamespace(dp_size=8, speculator=SimpleNamespace(dp_size=8)), SimpleNamespace(speculator=None), _Live()]
)
def test_no_worker_waits_for_other_engines(runner):
    """0.26's runner and its drafts keep the number, a runner may have none at all, and one that looks it up is left as it is."""
    leave_alone(SimpleNamespace(model_runner=runner))
    assert getattr(runner, "dp_size", 1) == 1 and getattr(getattr(runner, "speculator", None), "dp_size", 1) == 1

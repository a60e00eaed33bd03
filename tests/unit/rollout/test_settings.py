from types import SimpleNamespace

import pytest
import torch

from megatron_nft.rollout.settings import rounds_head


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

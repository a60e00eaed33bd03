"""Rope settings: Megatron-Core turns every position by the angles that transformers does."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_nft.errors import UserError
from megatron_nft.policy.model import rope_settings
from tests.support import LLAMA3_ROPE

HEAD = 64
LLAMA3 = LLAMA3_ROPE["rope_parameters"]
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "llama 3.1": LLAMA3,
    "llama 3.2": LLAMA3 | {"factor": 32.0},
}


def frequencies(rope: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(Megatron-Core's, transformers'), both [head / 2]."""
    config = LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    mine = RotaryEmbedding(HEAD, use_cpu_initialization=True, **rope_settings({"rope_parameters": rope}))
    return mine.inv_freq, LlamaRotaryEmbedding(config).inv_freq


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_frequencies_are_those_of_transformers(rope):
    """To the rounding of float32, relatively: so are the angles of all positions."""
    mine, theirs = frequencies(rope)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_scaling_matters():
    """The slowest pair turns eight times as slowly, the fastest ones as ever."""
    scaled, plain = (frequencies(rope)[0] for rope in (LLAMA3, {"rope_type": "default", "rope_theta": 5e5}))
    assert (plain[-1] / scaled[-1]).item() == pytest.approx(8.0) and torch.equal(plain[:8], scaled[:8])


def test_both_spellings():
    older = {"rope_theta": 5e5, "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}}
    assert rope_settings(older) == rope_settings({"rope_parameters": LLAMA3})


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, LLAMA3 | {"low_freq_factor": 2.0}])
def test_other_scaling_is_refused(rope):
    with pytest.raises(UserError, match=f"rope scaling is '{rope['rope_type']}'"):
        rope_settings({"rope_parameters": rope})

"""An engine that was handed one wrong tensor is found out, and the tensor is named: plain in vLLM, fused, packed, cut over ranks."""

import json
from pathlib import Path

import pytest

from tests.support import add_tokenizer, run_ranks, tiny_model

WORKER = Path(__file__).with_name("selfcheck_worker.py")
TENSORS = [
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.3.self_attn.o_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.3.mlp.down_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(("tp", "engine"), [(2, 0), (1, 1)], ids=["an engine over two ranks", "the second of two engines"])
def test_a_wrong_tensor_is_named(tp, engine, tmp_path):
    model = add_tokenizer(tiny_model(tmp_path / "model", tie=False, vocab_size=304, hidden_size=128, initializer_range=0.1))
    arguments = {
        "model": str(model),
        "tp": tp,
        "engine": engine,
        "tampered": TENSORS,
        "output": str(tmp_path / "said"),
    }
    run_ranks(WORKER, 2, arguments, tmp_path)
    for rank in range(2):
        said = json.loads((tmp_path / f"said.{rank}").read_text())
        assert said.pop("None") == "nothing"
        for name in TENSORS:
            assert name in said[name] and f"(engine {engine})" in said[name], said[name]
            others = [other for other in TENSORS if other != name and other in said[name]]
            assert not others, said[name]

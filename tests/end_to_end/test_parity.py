"""The three programs that compute log-probs of the same tokens agree: vLLM (as sampled), Megatron-Core (packed) and transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support import ROOT, add_tokenizer, run_ranks, tiny_model

WORKER = Path(__file__).with_name("parity_worker.py")
SMOLLM2 = ROOT / "examples" / "smollm2" / "model"
SUMS = [
    "Tom has 26 apples and buys 17 more. How many apples does Tom have now?",
    "There are 4 boxes with 11 pencils in each. How many pencils are there in all?",
    "Mei needs 40 stamps and already has 27. How many more stamps does Mei need?",
    "A shop sold 12 eggs in the morning and 30 in the afternoon. How many eggs did it sell that day?",
]


def compare(model: Path, prompts: list[list[int]], max_tokens: int, tolerance: float, tmp_path: Path) -> None:
    output = tmp_path / "logprobs.json"
    arguments = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "window": 256, "output": str(output)}
    run_ranks(WORKER, 1, arguments, tmp_path)
    answers = json.loads(output.read_text())
    assert len(answers) == len(prompts)
    lengths = [len(answer["vllm"]) for answer in answers]
    assert all(lengths) and sum(lengths) > 2 * len(prompts)
    for answer in answers:
        for name in ("vllm", "megatron"):
            assert answer[name] == pytest.approx(answer["huggingface"], abs=tolerance), name
    assert min(min(answer["huggingface"]) for answer in answers) < -0.1  # tokens that were not certain


@pytest.mark.parametrize(
    ("family", "tie", "changes"),
    [
        ("qwen2", True, {}),
        ("qwen2", False, {"num_key_value_heads": 4}),
        ("llama", False, {"head_dim": 64}),
        ("llama", True, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
)
def test_tiny_models(family, tie, changes, tmp_path):
    """To 2e-5: float32 sums in another order."""
    model = add_tokenizer(tiny_model(tmp_path / "model", family, tie, vocab_size=304, hidden_size=128, initializer_range=0.1, **changes))
    prompts = [[(7 * i + 3 * j) % 304 for j in range(2 + 5 * i)] for i in range(6)]
    compare(model, prompts, 24, 2e-5, tmp_path)


def test_the_demos_model(tmp_path):
    model = ROOT / "examples" / "arithmetic" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer.encode(f"<|im_start|>user\nWhat is {a}*7+{a}?<|im_end|>\n<|im_start|>assistant\n") for a in range(20, 30)]
    compare(model, prompts, 64, 2e-5, tmp_path)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="examples/smollm2/unpack.py has not been run")
def test_a_real_pretrained_model(tmp_path):
    """30 layers and a vocabulary of 49,152: to 1e-4."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, tokenize=False) for t in SUMS]
    compare(SMOLLM2, [tokenizer.encode(text, add_special_tokens=False) for text in texts], 100, 1e-4, tmp_path)

"""The three programs that compute log-probs of the same tokens agree: vLLM (as sampled), Megatron-Core (packed) and transformers.

Of Megatron-Core's layouts see tests/distributed/test_layouts.py.
"""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support import LLAMA3_ROPE, ROOT, add_tokenizer, pretrained_model, run_ranks, tiny_model

WORKER = Path(__file__).with_name("parity_worker.py")
DEMO = ROOT / "examples" / "arithmetic" / "model"
SUMS = [
    "Tom has 26 apples and buys 17 more. How many apples does Tom have now?",
    "There are 4 boxes with 11 pencils in each. How many pencils are there in all?",
    "Mei needs 40 stamps and already has 27. How many more stamps does Mei need?",
    "A shop sold 12 eggs in the morning and 30 in the afternoon. How many eggs did it sell that day?",
]
# vLLM's attention on a CPU has no heads of 16, and its experts come in multiples of 32
TINY = {
    "qwen2 tied": ("qwen2", True, {}),
    "qwen2 untied": ("qwen2", False, {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", False, {"head_dim": 64}),
    "qwen3 experts": ("qwen3_moe", False, {"head_dim": 64, "moe_intermediate_size": 64}),
    "llama wide heads": ("llama", False, {"head_dim": 64}),
    "llama 3 rope": ("llama", True, LLAMA3_ROPE),
    "mistral wide heads": ("mistral", False, {"head_dim": 64}),
}


def logprobs(cases: dict[str, dict], tmp_path: Path) -> dict[str, list[dict]]:
    """By name of the case: each answer's log-probs by program. One process for all models."""
    output = tmp_path / "logprobs.json"
    run_ranks(WORKER, 1, {"cases": cases, "window": 256, "output": str(output)}, tmp_path, timeout=1500)
    return json.loads(output.read_text())


def compare(answers: list[dict], prompts: int, tolerance: float) -> None:
    assert len(answers) == prompts
    lengths = [len(answer["vllm"]) for answer in answers]
    assert all(lengths) and sum(lengths) > 2 * prompts
    for answer in answers:
        for name in ("vllm", "megatron"):
            assert answer[name] == pytest.approx(answer["huggingface"], rel=0, abs=tolerance), name
    assert min(min(answer["huggingface"]) for answer in answers) < -0.1  # tokens that were not certain


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """Of the small models."""
    folder, cases = tmp_path_factory.mktemp("parity"), {}
    for name, (family, tie, changes) in TINY.items():
        sizes = {"vocab_size": 304, "hidden_size": 128, "initializer_range": 0.1, **changes}
        model = add_tokenizer(tiny_model(folder / name.replace(" ", "-"), family, tie, **sizes))
        prompts = [[(7 * i + 3 * j) % 304 for j in range(2 + 40 * i)] for i in range(6)]
        cases[name] = {"model": str(model), "prompts": prompts, "max_tokens": 24}
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = [f"<|im_start|>user\nWhat is {a}*7+{a}?<|im_end|>\n<|im_start|>assistant\n" for a in range(20, 30)]
    cases["demo"] = {"model": str(DEMO), "prompts": [tokenizer.encode(text) for text in texts], "max_tokens": 64}
    cases["calculator"] = cases["demo"] | {"function": str(ROOT / "examples/calculator/calculator.py:calculator")}
    return logprobs(cases, folder)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models(name, found):
    """To 2e-5: float32 sums in another order."""
    compare(found[name], 6, 2e-5)


def test_the_demos_model(found):
    compare(found["demo"], 10, 2e-5)


def test_answers_with_a_calculator(found):
    """What the model wrote lines up token for token, and what the calculator wrote, the value of every formula, is no part of it."""
    compare(found["calculator"], 10, 2e-5)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    sums = 0
    for answer in found["calculator"]:
        formulas = re.findall(r"(\d+(?:[-+*]\d+)+)=", answer["text"])
        assert tokenizer.decode(answer["masked"]) == "".join(str(eval(formula)) for formula in formulas), answer["text"]
        sums += len(formulas)
    assert sums > 10


def test_a_real_pretrained_model(tmp_path):
    """Layers, vocabulary and weights of a real size: to 1e-4."""
    model = pretrained_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, tokenize=False) for t in SUMS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    found = logprobs({"real": {"model": str(model), "prompts": prompts, "max_tokens": 60}}, tmp_path)
    compare(found["real"], len(SUMS), 1e-4)

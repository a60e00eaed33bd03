"""The policy on a GPU: Transformer Engine's layers and the local ones against transformers in float64, FP8, fp16, offload."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import made_up_groups, run_ranks, tiny_model

WORKER = Path(__file__).with_name("worker.py")
CONFIG = """
run_dir: unused
model: {path: PATH}
train: {prompts_per_update: 2, tokens_per_micro_batch: 128}
rollout: {n: 4, prompts_per_step: 4}
objective: {reduction_constant: 100.0}
optimizer: {lr: 1.0e-3, weight_decay: 0.01}
"""
HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_te = pytest.mark.skipif(not HAVE_TE, reason="no Transformer Engine")
LAYERS = [pytest.param(True, id="local"), pytest.param(False, id="Transformer Engine", marks=needs_te)]


def run(tmp_path: Path, model: Path, *overrides: str, local: bool = False) -> dict:
    config, output = tmp_path / "config.yaml", tmp_path / "out.pt"
    config.write_text(CONFIG.replace("PATH", str(model)))
    arguments = {"config": str(config), "overrides": list(overrides), "output": str(output), "local": local}
    run_ranks(WORKER, 1, arguments, tmp_path)
    return torch.load(output)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Sizes that FP8 can multiply, heads of 32."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
    return tiny_model(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture(scope="module")
def expected(model) -> dict[int, torch.Tensor]:
    """Log-probs of every answer by transformers in float64."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found = {}
    for group in made_up_groups():
        for response in group.responses:
            prompt = list(group.prompt.token_ids)
            with torch.no_grad():
                table = hf(torch.tensor([prompt + response.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found[len(found)] = table.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
    return found


def furthest(got: dict, expected: dict[int, torch.Tensor]) -> float:
    assert got["old"].keys() == expected.keys()
    return max((got["old"][n].double() - values).abs().max().item() for n, values in expected.items())


def test_float32_on_this_device(model, expected, tmp_path):
    """Here and on a GPU: to 1e-4, and the state comes back from the host as it went."""
    got = run(tmp_path, model, "model.precision=fp32")
    assert furthest(got, expected) < 1e-4
    assert got["journey"]["left"] == 0 and got["journey"]["bytes"] > 0 and all(got["journey"]["same"].values())


@needs_gpu
@pytest.mark.parametrize("local", LAYERS)
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_16_bits(precision, tolerance, local, model, expected, tmp_path):
    """Packed sequences, each by itself. bf16 rounds to 3 digits, fp16 to 4, in each of four layers."""
    got = run(tmp_path, model, f"model.precision={precision}", "optimizer.initial_loss_scale=256", local=local)
    assert furthest(got, expected) < tolerance
    assert ("Transformer Engine layers" in got["kernels"]) == (not local)
    assert all(math.isfinite(update["loss"]) and update["grad_norm"] > 0 for update in got["updates"])


@needs_gpu
@pytest.mark.parametrize("local", LAYERS)
def test_the_state_leaves_the_gpu_and_comes_back_bit_for_bit(local, model, tmp_path):
    journey = run(tmp_path, model, "model.precision=bf16", local=local)["journey"]
    assert journey["left"] == 0 and all(journey["same"].values())
    assert journey["freed"] >= journey["bytes"] > 0


@needs_gpu
@needs_te
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_an_fp8_update_is_finite_and_near_bf16(recipe, model, tmp_path):
    """e4m3 keeps 1 to 2 digits: gradient norms to 20 %."""
    fp8 = run(tmp_path, model, "model.precision=bf16", "model.fp8=hybrid", f"model.fp8_recipe={recipe}")
    bf16 = run(tmp_path, model, "model.precision=bf16")
    assert f"FP8 (hybrid, {recipe})" in fp8["kernels"]
    for mine, theirs in zip(fp8["updates"], bf16["updates"], strict=True):
        assert math.isfinite(mine["loss"]) and mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)
    assert any(not torch.equal(fp8["old"][n], values) for n, values in bf16["old"].items())  # it was FP8


@needs_gpu
@needs_te
def test_parameters_kept_in_fp8_start_from_unrounded_ones(model, tmp_path):
    got = run(tmp_path, model, "model.precision=bf16", "model.fp8=hybrid", "model.fp8_param_gather=true")
    assert all(math.isfinite(update["loss"]) and update["grad_norm"] > 0 for update in got["updates"])

"""The kernels that the policy is run with: one process runs all cases that this machine can."""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.support import run_ranks, tiny_model

WORKER = Path(__file__).with_name("policy_worker.py")
GPU = torch.cuda.is_available()
TE = GPU and importlib.util.find_spec("transformer_engine") is not None
CONFIG = """
run_dir: unused
model: {path: PATH}
train: {prompts_per_update: 2, tokens_per_micro_batch: 128}
rollout: {n: 4, prompts_per_step: 4}
objective: {reduction_constant: 100.0}
optimizer: {lr: 0.0, weight_decay: 0.0}
"""
# on a GPU sides that FP8's blocks of 128 divide, heads of 64
SIZES = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
TINY = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
BF16, FP16, FP32 = ("model.precision=bf16",), ("model.precision=fp16", "optimizer.initial_loss_scale=256"), ("model.precision=fp32",)
DETERMINISTIC = ("megatron.transformer.deterministic_mode=true",)
ADAM = ("optimizer.lr=1e-2", "optimizer.weight_decay=0.1")


@dataclass
class Case:
    overrides: tuple[str, ...]
    local: bool = False  # Megatron's local layers also where Transformer Engine is
    alone: bool = False  # one answer a micro-batch, with the padding behind it
    part: str = "passes"  # or passes and a journey to the host and back, or Adam's updates


def fp8(recipe: str, *more: str) -> Case:
    return Case((*BF16, "model.fp8=hybrid", f"model.fp8_recipe={recipe}", *more))


ANYWHERE = {
    "fp32": Case(FP32, local=True, part="journey"),
    "fp32 alone": Case(FP32, local=True, alone=True),
    "fp32 adam": Case((*FP32, *ADAM), local=not TE, part="adam"),
    "fp32 deterministic": Case((*FP32, *DETERMINISTIC), local=True),
    "bf16 local": Case(BF16, local=True, part="journey"),
    "bf16 local alone": Case(BF16, local=True, alone=True),
    "bf16 adam": Case((*BF16, *ADAM), local=not TE, part="adam"),
    "bf16 local deterministic": Case((*BF16, *DETERMINISTIC), local=True),
}
ON_A_GPU = {"fp16 local": Case(FP16, local=True)}
WITH_TE = {
    "bf16 TE": Case(BF16, part="journey"),
    "bf16 TE alone": Case(BF16, alone=True),
    "fp16 TE": Case(FP16),
    "bf16 TE deterministic": Case((*BF16, *DETERMINISTIC)),
    "tensorwise": fp8("tensorwise"),
    "delayed": fp8("delayed"),
    "blockwise": fp8("blockwise"),
    "tensorwise, kept in FP8": fp8("tensorwise", "model.fp8_param_gather=true"),
}
CASES = ANYWHERE | (ON_A_GPU if GPU else {}) | (WITH_TE if TE else {})


def make_model(folder: Path) -> Path:
    """A random model of four layers with opinions: log-probs of -4.9 in the mean, 0.8 around it."""
    return tiny_model(folder, **(SIZES if GPU else TINY))


def run_cases(model: Path, folder: Path) -> dict[str, dict]:
    """By name of the case, what policy_worker.run found, or its error, or the one that ended the process before it. "end": how that
    itself ended."""
    config, output = folder / "config.yaml", folder / "out.pt"
    config.write_text(CONFIG.replace("PATH", str(model)))
    arguments = {"config": str(config), "output": str(output), "cases": {name: asdict(case) for name, case in CASES.items()}}
    ended = ""
    try:
        run_ranks(WORKER, 1, arguments, folder, timeout=300 if GPU else 600)
    except AssertionError as error:
        ended = str(error)
    found = torch.load(output, weights_only=False) if output.exists() else {}
    return {name: found.get(name, {"error": ended}) for name in CASES} | {"end": {"error": ended} if ended else {}}

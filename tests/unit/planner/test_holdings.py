"""Bytes of weights, gradients and optimizer: what Megatron allocates on every rank, to the byte."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.holdings import Stage, offloaded
from megatron_nft.planner.saves import checkpoint_bytes
from megatron_nft.weights import read_json
from tests.support import ROOT, tiny_model
from tests.unit.planner.holdings_worker import configured

WORKER, SAVER = (Path(__file__).with_name(f"{name}_worker.py") for name in ("holdings", "checkpoint"))
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 101,  # divisible by nothing, as are the other sizes by a bucket's 128
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MODELS = {
    "untied": QWEN2,
    "tied": QWEN2 | {"tie_word_embeddings": True},
    "experts": QWEN2
    | {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}


@dataclass
class Case:
    """A layout of a model; more: further settings."""

    model: str
    ranks: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None
    precision: str = "bf16"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"tensor": self.tp, "pipeline": self.pp, "virtual_pipeline": self.vpp, "expert": self.ep}
        parallel = {f"{name}_model_parallel_size": size for name, size in sizes.items()}
        parallel |= {"context_parallel_size": self.cp, "expert_tensor_parallel_size": self.etp}
        parallel |= {"sequence_parallel": self.tp > 1, "overlap_grad_reduce": False}
        return {"model.precision": self.precision, **{f"parallel.{name}": value for name, value in parallel.items()}, **self.more}

    def stages(self) -> list[Stage]:
        dp = self.ranks // (self.tp * self.pp * self.cp)
        layout = Layout(self.tp, self.pp, self.cp, dp, self.vpp or 1, self.ep, self.etp or self.tp, self.tp > 1)
        return Stage.all(MODELS[self.model], configured(self.settings), layout, transformer_engine=False)


def buckets(size: int) -> dict[str, Any]:
    return {"parallel.overlap_grad_reduce": True, "megatron.ddp": {"bucket_size": size}}


CASES = {
    "one rank": Case("tied", 1),
    "fp32, DP3": Case("untied", 3, precision="fp32"),
    "fp16, TP2 DP2": Case("tied", 4, tp=2, precision="fp16"),
    "TP2 PP2": Case("untied", 4, tp=2, pp=2),
    "tied PP2 DP3": Case("tied", 6, pp=2, more=buckets(3000)),
    "tied PP2 VPP2 DP2": Case("tied", 4, pp=2, vpp=2, more=buckets(10**6)),
    "CP2 DP3, small buckets": Case("untied", 6, cp=2, more=buckets(5000)),
    "TP2 CP2, wide buckets": Case("untied", 4, tp=2, cp=2, more={"megatron.ddp": {"pad_buckets_for_high_nccl_busbw": True}}),
    "bf16 gradients, DP2": Case("tied", 2, more={"megatron.ddp": {"grad_reduce_in_fp32": False}}),
    "experts DP2": Case("experts", 2),
    "experts EP2 DP4": Case("experts", 4, ep=2, more=buckets(4000)),
    "experts TP2 EP2 ETP1 PP2": Case("experts", 8, tp=2, pp=2, ep=2, etp=1),
    "experts TP2 EP2 ETP2 DP4": Case("experts", 8, tp=2, ep=2, etp=2),
    "experts CP2 EP4 VPP2": Case("experts", 8, pp=2, vpp=2, cp=2, ep=4),
}


@pytest.fixture(scope="module")
def allocated(tmp_path_factory) -> dict[str, list[dict[str, int]]]:
    """What Megatron holds, in a process of its own: on the CPU it changes torch."""
    here = tmp_path_factory.mktemp("holdings")
    cases = [{"name": name, "hf": MODELS[case.model], "ranks": case.ranks, "settings": case.settings} for name, case in CASES.items()]
    (here / "cases.json").write_text(json.dumps(cases))
    run(WORKER, here / "cases.json", here / "found.json")
    return json.loads((here / "found.json").read_text())


def run(*command: Path) -> str:
    """What a script prints, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], check=True, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_what_megatron_allocates(name, allocated):
    stages = CASES[name].stages()
    held = [stage.held(rank) for stage in stages for rank in range(stage.ranks)]
    mine = [{"weights": one.weights, "gradients": one.gradients, "optimizer": one.optimizer} for one in held]
    assert mine == allocated[name]
    assert max(one.device for one in held) == max(stage.fullest.device for stage in stages)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
def test_a_checkpoint_has_the_size_that_is_foreseen(tie, tmp_path):
    """Each tensor's own file inside the files takes a kilobyte more: less than a hundredth here."""
    model = tiny_model(tmp_path / "model", tie=tie, hidden_size=256, intermediate_size=512)
    foreseen = checkpoint_bytes(configured({"model.precision": "bf16"}), read_json(model / "config.json"))["checkpoint"]
    assert foreseen < int(run(SAVER, model, tmp_path / "checkpoint")) < 1.01 * foreseen


@pytest.mark.slow  # imports Megatron
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("sizes", [[7], [5, 3, 9, 1, 4], [1000, 1, 1]])
def test_the_host_updates_what_megatron_moves_there(sizes, fraction):
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    class Piece(SimpleNamespace):
        """A parameter that is said to be on a GPU until it is copied."""

        is_cuda, dtype = True, None

        def numel(self):
            return self.size

        def cpu(self):
            return Piece(size=self.size, is_cuda=False)

        detach = clone = pin_memory = float = lambda self: self
        __hash__ = object.__hash__

    optimizer = SimpleNamespace(param_groups=[{"params": [Piece(size=size) for size in sizes]}], param_update_in_fp32=False)
    host, *_ = HybridDeviceOptimizer._get_sub_optimizer_param_groups(optimizer, fraction)
    assert offloaded(sizes, fraction) == sum(piece.size for group in host for piece in group["params"])

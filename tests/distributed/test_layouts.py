"""The same mini-batches give the same losses, gradients and parameters under every layout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_nft.policy import versions
from tests.support import made_up_groups, run_ranks, tiny_model

WORKER = Path(__file__).with_name("update_worker.py")
# adam_eps 1 and lr 1: the first update is -g / (|g| + 1), so parameters differ by what gradients differ, near-zero ones included
CONFIG = """
run_dir: unused
model: {path: PATH}
train: {prompts_per_update: 2, tokens_per_micro_batch: 64}
rollout: {n: 4, prompts_per_step: 4}
objective: {reduction_constant: 100.0}
optimizer: {lr: 1.0, adam_eps: 1.0, clip_grad: 1.0, weight_decay: 0.01}
"""


def run(tmp_path: Path, model: Path, ranks: int, *overrides: str) -> dict:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("PATH", str(model)))
    output = tmp_path / "out.pt"
    run_ranks(WORKER, ranks, {"config": str(config), "overrides": list(overrides), "output": str(output)}, tmp_path)
    return torch.load(output)


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request, tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tie=request.param == "tied")


@pytest.fixture(scope="module")
def single(model, tmp_path_factory) -> dict:
    got = run(tmp_path_factory.mktemp("single"), model, 1)
    assert got["megatron"] == versions.version()  # ranks run the Megatron-Core that this process would
    return got


TP2, PP2, SP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2", "parallel.sequence_parallel=true"
OVERLAP = "parallel.overlap_grad_reduce=true"
LAYOUTS = {
    "small micro-batches": (1, ["train.tokens_per_micro_batch=36"]),
    "recompute": (1, ["train.recompute_granularity=full"]),
    "recompute of two layers": (1, ["train.recompute_granularity=full", "train.recompute_method=block", "train.recompute_num_layers=2"]),
    "recompute of attention and MLP": (
        1,
        ["train.recompute_granularity=selective", "train.recompute_modules=[core_attn, mlp]"],
    ),
    "TP2": (2, [TP2]),
    "TP2 SP": (2, [TP2, SP]),
    "PP2": (2, [PP2]),
    "DP2": (2, []),
    "TP2 PP2": (4, [TP2, PP2]),
}


@pytest.mark.parametrize("overrides", [[OVERLAP], [OVERLAP, "parallel.overlap_param_gather=true"]], ids=["reduce", "reduce and gather"])
def test_overlapped_reduction_with_uneven_updates(overrides, model, single, tmp_path):
    """What a GPU does: the reduction starts within the backward pass of the last micro-batch, of which updates have unequally many."""
    got = run(tmp_path, model, 2, "train.tokens_per_micro_batch=36", *overrides)
    for mine, reference in zip(got["updates"], single["updates"], strict=True):
        assert mine == pytest.approx(reference, rel=1e-5, abs=1e-7)
    for name, tensor in single["after"].items():  # of the whole model, whatever the next forward pass would have gathered
        torch.testing.assert_close(got["after"][name], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_rank(layout, model, single, tmp_path):
    """Losses and gradient norms to 1e-5 relative, parameters to 2e-6 (float32 sums in another order)."""
    ranks, overrides = LAYOUTS[layout]
    got = run(tmp_path, model, ranks, *overrides)
    for name, tensor in single["before"].items():
        assert torch.equal(got["before"][name], tensor), name
    assert got["old"] == pytest.approx(single["old"], rel=1e-5)
    for mine, reference in zip(got["updates"], single["updates"]):
        assert mine == pytest.approx(reference, rel=1e-5, abs=1e-7)
    assert len(single["updates"]) == 2 and single["updates"][0]["grad_norm"] > 0.1
    for name, tensor in single["after"].items():
        assert not torch.equal(tensor, single["before"][name]), f"{name} was not trained"
        torch.testing.assert_close(got["after"][name], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def reference(model: Path) -> dict:
    """The same two updates by transformers, autograd and torch's AdamW in float64, the loss written out from the paper."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    groups = made_up_groups()

    def logprobs(group, response) -> torch.Tensor:
        ids = torch.tensor([[*group.prompt.token_ids, *response.token_ids]])
        table = hf(ids).logits[0, len(group.prompt.token_ids) - 1 : -1].log_softmax(-1)
        return table.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]

    with torch.no_grad():
        old = {(g.position, k): logprobs(g, r) for g in groups for k, r in enumerate(g.responses)}
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1.0, weight_decay=0.01)
    updates = []
    for mini_batch in (groups[:2], groups[2:]):
        loss = torch.zeros((), dtype=torch.float64)
        for group in mini_batch:
            rate = group.correct_rate
            for k, response in enumerate(group.responses):
                ratio = (logprobs(group, response) - old[group.position, k]).exp()
                implicit = (1 - rate * ratio) / (1 - rate)
                implicit = (implicit.clamp(min=1.0) - implicit).detach() + implicit  # max_v with eps = 1
                term = ratio.log() if response.verdict.score == 1.0 else implicit.log()
                loss = loss - (1 - rate) * term.sum() / 100.0
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        updates.append({"loss": loss.item(), "grad_norm": norm.item()})
    return {"before": before, "after": dict(hf.named_parameters()), "updates": updates}


def test_one_rank_equals_transformers_in_float64(model, single):
    """Loss and gradient norm to 2e-5 relative, parameters to 5e-6: what float32 loses in four layers and two updates."""
    expected = reference(model)
    for mine, theirs in zip(single["updates"], expected["updates"], strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert abs(expected["updates"][1]["loss"]) > 1e-3  # off-policy by then: the loss has a value
    for name, value in expected["after"].items():
        torch.testing.assert_close(single["before"][name].double(), expected["before"][name], rtol=0, atol=0)
        torch.testing.assert_close(single["after"][name].double(), value.detach(), rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")

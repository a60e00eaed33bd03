"""Twenty updates of the program equal twenty of an independent training loop that knows nothing of it but its recorded rollouts.

The loop is plain PyTorch: a Hugging Face model, one answer at a time without packing, torch's AdamW and gradient clip, the loss
written out from the paper, and the authors' reduction on two simulated data-parallel ranks: each sums over its answers and divides by
1000, then gradients are averaged over the ranks. In float32, as in the program: float64 parameters would differ by what float32
rounds off in twenty updates (2e-6).
"""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.end_to_end.runs import DEMO, rows, run

STEPS, UPDATES, PROMPTS, LR, WEIGHT_DECAY = 5, 4, 10, 2e-6, 0.1
RANKS = 2
SETTINGS = [
    f"train.steps={STEPS}",
    f"rollout.prompts_per_step={UPDATES * PROMPTS}",
    f"train.prompts_per_update={PROMPTS}",
    "train.tokens_per_micro_batch=1024",
    "objective.normalize=0",
    "objective.reduction=constant",
    f"objective.reduction_constant={1000 * RANKS}",
    f"optimizer.lr={LR}",
    f"optimizer.weight_decay={WEIGHT_DECAY}",
    "evaluation.interval=0",
    "checkpoint.interval=0",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trajectory")
    run("train", folder / "run", *SETTINGS, log=folder / "log")
    return folder / "run"


def groups_of(path: Path) -> list[list[dict]]:
    """The recorded answers, a list for each prompt."""
    groups: list[list[dict]] = []
    for row in pyarrow.parquet.read_table(path).to_pylist():
        if row["sample"] == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


def logprobs(model, row: dict) -> torch.Tensor:
    ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
    logits = model(ids).logits[0, len(row["prompt_tokens"]) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]


def token_loss(new: torch.Tensor, old: torch.Tensor, right: float, rate: float) -> torch.Tensor:
    """Eq. 10 with eps = 1 and w = 1, summed over the answer's tokens."""
    ratio = (new - old).exp()
    if right == 1.0:
        return -(new - old).sum()
    implicit = (1 - rate * ratio) / (1 - rate)
    kept = (implicit.clamp(min=1.0) - implicit).detach() + implicit
    return -kept.log().sum()


def reference(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[list[tuple[float, float]]]]:
    """Final weights, and (loss, gradient norm) of every update of every step."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)
    told = []
    for step in range(1, STEPS + 1):
        groups = groups_of(run_dir / "rollouts" / f"step_{step}.parquet")
        with torch.no_grad():
            old = [[logprobs(model, row) for row in group] for group in groups]
        told.append([update(model, optimizer, groups[i : i + PROMPTS], old[i : i + PROMPTS]) for i in range(0, len(groups), PROMPTS)])
    return dict(model.named_parameters()), told


def update(model, optimizer, groups, old) -> tuple[float, float]:
    answers = []
    for group, group_old in zip(groups, old, strict=True):
        rate = sum(row["verdict"] for row in group) / len(group)
        answers += [(row, before, rate) for row, before in zip(group, group_old, strict=True)]
    optimizer.zero_grad()
    total = 0.0
    for rank in range(RANKS):
        for row, before, rate in answers[rank::RANKS]:
            loss = token_loss(logprobs(model, row), before, row["verdict"], rate) / 1000 / RANKS
            loss.backward()
            total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    return total, norm


def test_twenty_updates_equal_plain_pytorch(finished):
    """Losses and gradient norms of every step to 1e-4 relative, every parameter to 1e-6 after moving by some 4e-5."""
    after, told = reference(finished)
    steps = rows(finished)
    assert [len(updates) for updates in told] == [UPDATES] * STEPS == [row["train/updates"] for row in steps]
    for row, updates in zip(steps, told, strict=True):
        losses, norms = zip(*updates, strict=True)
        assert row["train/loss"] == pytest.approx(sum(losses) / UPDATES, rel=1e-4, abs=1e-6)
        assert row["train/grad_norm"] == pytest.approx(sum(norms) / UPDATES, rel=1e-4)
        assert row["train/clipped_updates"] == sum(norm > 1.0 for norm in norms) / UPDATES
    assert 0 < sum(row["train/clipped_updates"] for row in steps) < STEPS  # the clip has touched some updates and not others
    start, end = (load_file(path / "model.safetensors") for path in (DEMO / "model", finished / "huggingface"))
    moved = max((end[name].double() - start[name].double()).abs().max() for name in end)
    furthest = {name: (end[name].double() - value.detach()).abs().max().item() for name, value in after.items()}
    assert set(end) == set(after) and moved > 3e-5
    assert max(furthest.values()) < 1e-6, json.dumps(furthest, indent=1)

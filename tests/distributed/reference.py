"""The fixed rollout's log-probs and updates by transformers, autograd and torch's AdamW in float64, the loss written out from the paper."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_nft.trajectories import Group, Response
from tests.support import as_in_files


def two_updates(model: Path, groups: list[Group]) -> dict:
    """NFT on two mini-batches of two groups: parameters before and after, loss and gradient norm of each update."""
    hf = load(model, torch.float64)
    with torch.no_grad():
        old = {(g.position, k): logprobs(hf, g, r) for g in groups for k, r in enumerate(g.responses)}
    before = {name: p.detach().clone() for name, p in as_in_files(hf.named_parameters())}
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1.0, weight_decay=0.01)
    updates = []
    for mini_batch in (groups[:2], groups[2:]):
        loss = nft_loss(hf, mini_batch, old)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        updates.append({"loss": loss.item(), "grad_norm": norm.item()})
    return {"before": before, "after": {name: p.detach() for name, p in as_in_files(hf.named_parameters())}, "updates": updates}


def gradients(model: Path, groups: list[Group]) -> list[dict[str, torch.Tensor]]:
    """NFT's gradients of two mini-batches of two groups, both at the model's own weights, by the tensors' names in files."""
    hf, found = load(model, torch.float64), []
    with torch.no_grad():
        old = {(g.position, k): logprobs(hf, g, r) for g in groups for k, r in enumerate(g.responses)}
    for mini_batch in (groups[:2], groups[2:]):
        hf.zero_grad()
        nft_loss(hf, mini_batch, old).backward()
        found.append({name: gradient.clone() for name, gradient in as_in_files((n, p.grad) for n, p in hf.named_parameters())})
    return found


def nft_loss(hf, groups: list[Group], old: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """Of a mini-batch, the sum over tokens divided by 100. old: pi_old's log-probs by the group's position and the answer's number."""
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rate = group.correct_rate
        for k, response in enumerate(group.responses):
            ratio = (logprobs(hf, group, response) - old[group.position, k]).exp()
            implicit = (1 - rate * ratio) / (1 - rate)
            implicit = (implicit.clamp(min=1.0) - implicit).detach() + implicit  # max_v with eps = 1
            term = ratio.log() if response.verdict.score == 1.0 else implicit.log()
            loss = loss - (1 - rate) * term.sum() / 100.0
    return loss


@torch.no_grad()
def logprobs_of(model: Path, groups: list[Group], dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    """By number of the answer."""
    hf = load(model, dtype)
    return dict(enumerate(logprobs(hf, group, response) for group in groups for response in group.responses))


def load(model: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager")


def logprobs(hf, group: Group, response: Response) -> torch.Tensor:
    ids = torch.tensor([[*group.prompt.token_ids, *response.token_ids]])
    table = hf(ids).logits[0, len(group.prompt.token_ids) - 1 : -1].log_softmax(-1)
    return table.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]

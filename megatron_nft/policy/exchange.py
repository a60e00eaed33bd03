"""Moves each sampled answer from the rank that sampled it to the ranks that train it, in one all-to-all."""

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft.batching import Answers, Plan, TrainingAnswer
from megatron_nft.policy.topology import Topology, device
from megatron_nft.trajectories import Group, Response


def table(groups: list[Group]) -> tuple[Answers, list[int]]:
    """Lengths and verdicts of all ranks' groups, in order of position: what batching.plan needs, and all that is gathered.

    `groups` are this rank's own. Returns the table and, for each own group, the number of its first answer in it.
    """
    own = [(group.position, [_row(group, response) for response in group.responses]) for group in groups]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    ordered = sorted((row for rows in everyone for row in rows), key=lambda row: row[0])
    sizes = [len(answers) for _, answers in ordered]
    first = dict(zip((position for position, _ in ordered), np.cumsum([0, *sizes]).tolist()))
    values = np.array([answer for _, answers in ordered for answer in answers], dtype=np.float64).reshape(-1, 5)
    lengths = values[:, :3].astype(np.int64)
    of_group = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.repeat(np.array([position for position, _ in ordered], np.int64), sizes)
    return Answers(*lengths.T, values[:, 3], values[:, 4], of_group, positions), [first[group.position] for group in groups]


def _row(group: Group, response: Response) -> tuple[float, ...]:
    return len(group.prompt.token_ids), len(response.token_ids), sum(response.mask()), response.verdict.score, response.penalty


def exchange(groups: list[Group], numbers: list[int], plan: Plan, topology: Topology) -> dict[int, TrainingAnswer]:
    """Answers that this rank's replica trains, by their number in the plan. `numbers` are those of the groups' first answers (from
    `table`)."""
    replica_of = plan.replica_of()
    outbox: list[list[np.ndarray]] = [[] for _ in range(topology.world_size)]
    for group, first in zip(groups, numbers):
        for number, response in enumerate(group.responses, first):
            record = _encode(number, group.prompt.token_ids, response)
            for rank, replica in enumerate(topology.replica_of_rank):
                if replica == replica_of[number]:
                    outbox[rank].append(record)
    return _decode(_all_to_all([np.concatenate(box) if box else np.empty(0) for box in outbox]))


def _encode(number: int, prompt: tuple[int, ...], response) -> np.ndarray:
    """One answer as float64, which holds token ids, masks and float32 log-probs exactly."""
    header = [number, len(prompt), len(response.token_ids), response.verdict.score]
    return np.concatenate([header, prompt, response.token_ids, response.mask(), response.logprobs])


def _decode(flat: np.ndarray) -> dict[int, TrainingAnswer]:
    answers, at = {}, 0
    while at < len(flat):
        number, p, r = (int(x) for x in flat[at : at + 3])
        verdict, at = float(flat[at + 3]), at + 4
        prompt, response, mask, logprobs = np.split(flat[at : at + p + 3 * r], [p, p + r, p + 2 * r])
        ids = (part.astype(np.int64).tolist() for part in (prompt, response))
        answers[number] = TrainingAnswer(*ids, logprobs.tolist(), mask.astype(np.int64).tolist(), verdict)
        at += p + 3 * r
    return answers


def _all_to_all(boxes: list[np.ndarray]) -> np.ndarray:
    """Everything the world has for this rank, end to end."""
    if len(boxes) == 1:
        return boxes[0]
    sent = torch.tensor([len(box) for box in boxes], device=device())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    out = torch.empty(int(received.sum()), dtype=torch.float64, device=device())
    flat = torch.from_numpy(np.concatenate(boxes)).to(device())
    dist.all_to_all_single(out, flat, received.tolist(), sent.tolist())
    return out.cpu().numpy()

"""The groups of the exchange test: how they lie on the ranks, and bits that a lossy path would change."""

import numpy as np

from megatron_nft.trajectories import Group
from tests.support import made_up_groups


def all_groups(count: int, n: int) -> list[Group]:
    """Groups at positions with gaps (others were not kept), one with an answer less; float32 log-probs, large token ids, masks,
    penalties, scores between 0 and 1."""
    groups = made_up_groups(count, n, seed=3)
    for g, group in enumerate(groups):
        group.position = 3 * g + g % 2
        for k, response in enumerate(group.responses):
            response.logprobs = np.float32(response.logprobs).tolist()
            response.token_ids[0] = 151_935 - k
            response.verdict = type(response.verdict)(response.verdict.score / 3, response.verdict.outcome)
            response.penalty = -k / 7
            response.loss_mask = None if k == 0 else [int((t + k) % 3 > 0) for t in range(len(response.token_ids))]
    if len(groups) > 1:
        groups[1].responses.pop()
    if groups:
        groups[0].responses[0].logprobs[0] = float("-inf")
    return groups


def groups_of_rank(count: int, n: int, spread: str, rank: int, world: int) -> list[Group]:
    """`turns`: group i on rank i mod world; `last`: all on the last rank; `half`: in turns on the even ranks, as with engines of two."""
    groups = all_groups(count, n)
    if spread == "last":
        return groups if rank == world - 1 else []
    if spread == "half":
        return [] if rank % 2 else groups[rank // 2 :: world // 2]
    return groups[rank::world]

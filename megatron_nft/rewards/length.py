"""What the length of an answer does to its reward: answers cut off at the limit, and DAPO's soft overlong penalty."""

from dataclasses import replace

from megatron_nft.config import RewardConfig
from megatron_nft.trajectories import Response


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft penalty, arXiv 2503.14476, Eq. 13: 0 up to max_tokens - buffer tokens, then linearly down to -1 at max_tokens."""
    return max(min((max_tokens - buffer - length) / buffer, 0.0), -1.0)


def settle(response: Response, reward: RewardConfig, max_tokens: int) -> None:
    """Apply reward.truncated to a judged answer that ran into max_tokens, and reward.overlong_buffer to any.

    wrong (the paper's): verdict 0 whatever the judge said; it counts in r̂, in the denominators, and is trained on.
    mask: verdict 0 and counted in r̂ likewise, but no token of it is trained on or counted in a denominator.
    drop: as is_dropped says, the answer leaves its group, as if it had never been sampled; r̂ is the mean of those that are left.
    """
    if is_dropped(response):
        if response.verdict.score:  # a zero keeps its outcome
            response.verdict = replace(response.verdict, score=0.0, outcome="wrong")
        if reward.truncated == "mask":
            response.loss_mask = [0] * len(response.token_ids)
    if reward.overlong_buffer is not None:
        response.penalty = overlong_penalty(len(response.token_ids), max_tokens, reward.overlong_buffer)


def is_dropped(response: Response) -> bool:
    """Whether reward.truncated drop leaves the answer out."""
    return response.finish_reason == "length"

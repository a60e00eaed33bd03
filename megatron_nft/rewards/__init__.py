"""Verdicts: what an answer is worth, in [0, 1], decided in worker processes that can be killed.

A verdict function takes (response, answer), both strings, and gives a trajectories.Verdict or a number in [0, 1].
"""

from megatron_nft.rewards.judge import Judge

__all__ = ["Judge"]

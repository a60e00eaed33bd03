"""Writing answers: the vLLM engine, the sampler with its dynamic sampling, and the record of what was sampled.

vLLM is imported when an Engine is made and not before, so that this package imports without it.
"""

from megatron_nft.rollout.engine import Engine, Request, check_world
from megatron_nft.rollout.record import read_coefficients, read_rollouts, rollout_path, write_coefficients, write_rollouts
from megatron_nft.rollout.sampler import Rollout, Sampler

__all__ = [
    "Engine", "Request", "Rollout", "Sampler", "check_world", "read_coefficients", "read_rollouts", "rollout_path", "write_coefficients",
    "write_rollouts",
]  # fmt: skip

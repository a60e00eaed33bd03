"""Writing answers: the vLLM engines, in this process or as servers, the samplers with their queue, and the record of what was sampled.

vLLM is imported when an Engine is made and not before, so that this package imports without it.
"""

from megatron_nft.rollout.arguments import command_line, engine_arguments
from megatron_nft.rollout.engine import Engine, Request
from megatron_nft.rollout.modes import check, start
from megatron_nft.rollout.record import read_coefficients, read_rollouts, rollout_path, write_coefficients, write_rollouts
from megatron_nft.rollout.replay import check_replay, check_resumed
from megatron_nft.rollout.sampler import Rollout, Sampler

__all__ = [
    "Engine", "Request", "Rollout", "Sampler", "check", "check_replay", "check_resumed", "command_line", "engine_arguments",
    "read_coefficients", "read_rollouts", "rollout_path", "start", "write_coefficients", "write_rollouts",
]  # fmt: skip

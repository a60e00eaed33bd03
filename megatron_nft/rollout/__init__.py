"""Writing answers: the vLLM engine, the sampler with its dynamic sampling, and the record of what was sampled.

vLLM is imported when an Engine is made and not before, so that this package imports without it.
"""

from megatron_nft.rollout import tools
from megatron_nft.rollout.arguments import check, command_line, engine_arguments
from megatron_nft.rollout.engine import Engine, Request, check_world
from megatron_nft.rollout.record import (
    read_coefficients,
    read_rollouts,
    rollout_path,
    step_files,
    write_coefficients,
    write_rollouts,
)
from megatron_nft.rollout.replay import NoEngine, Replay, check_replay, check_resumed
from megatron_nft.rollout.sampler import Rollout, Sampler

__all__ = [
    "Engine", "NoEngine", "Replay", "Request", "Rollout", "Sampler", "check", "check_replay", "check_resumed", "check_world",
    "command_line", "engine_arguments", "read_coefficients", "read_rollouts", "rollout_path", "step_files", "tools",
    "write_coefficients", "write_rollouts",
]  # fmt: skip

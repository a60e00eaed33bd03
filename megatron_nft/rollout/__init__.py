"""Writing answers: the vLLM engine, the sampler with its dynamic sampling, and the record of what was sampled.

vLLM is imported when an Engine is made and not before, so that this package imports without it.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_nft.config import Config, max_model_len
from megatron_nft.rollout.arguments import check, command_line, engine_arguments
from megatron_nft.rollout.asynchronous import ServedSampler
from megatron_nft.rollout.engine import Engine, Request, check_world
from megatron_nft.rollout.record import read_rollouts, rollout_path, write_rollouts
from megatron_nft.rollout.sampler import Rollout, Sampler
from megatron_nft.rollout.served import ServedEngine
from megatron_nft.weights import Bucket

if TYPE_CHECKING:
    from megatron_nft.prompts import Cursor
    from megatron_nft.rewards.judge import Judge

__all__ = [
    "Engine", "Request", "Rollout", "Sampler", "ServedEngine", "ServedSampler", "check", "check_world", "command_line",
    "engine_arguments", "read_rollouts", "rollout_path", "start", "write_rollouts",
]  # fmt: skip


def start(
    config: Config,
    precision: str,
    judge: "Judge",
    cursor: "Cursor",
    asked_to_stop: Callable[[], bool],
    weights: Callable[[], Iterator[Bucket]],
    note: Callable[[str], None],
) -> tuple[Engine | ServedEngine, Sampler | ServedSampler]:
    """The engine and the sampler of a training run, as rollout.mode says: of one interface. Their first weights come by sampler.sync.

    precision is "fp32", "bf16" or "fp16"; weights() streams the trainer's, a collective; note is told of servers that come and go.
    """
    if config.rollout.mode == "served":
        served = ServedEngine(config, weights, asked_to_stop, note)
        return served, ServedSampler(served, judge, cursor, config)
    window = max_model_len(config)
    engine = Engine(config.model.path, config.rollout, window, precision, config.seed, asked_to_stop, weights_follow=True)
    return engine, Sampler(engine, judge, cursor, config)

"""Where the answers of a training run come from: an engine in this process, servers, or the record of another run."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_nft.config import Config, max_model_len
from megatron_nft.config.engine import check_world
from megatron_nft.rollout import arguments, tools
from megatron_nft.rollout.asynchronous import ServedSampler
from megatron_nft.rollout.engine import Engine
from megatron_nft.rollout.replay import NoEngine, Replay
from megatron_nft.rollout.sampler import Sampler
from megatron_nft.rollout.served import ServedEngine
from megatron_nft.weights import Bucket

if TYPE_CHECKING:
    from megatron_nft.prompts import Cursor
    from megatron_nft.rewards.judge import Judge


def check(config: Config, world: int) -> None:
    """Raise UserError for what the settings ask of vLLM, of `world` processes or of a rollout function and cannot have."""
    if config.replay:
        return
    if config.rollout.mode == "colocated":
        check_world(config.rollout, world)
    arguments.check(config.rollout)
    if config.rollout.function:
        tools.resolve(config.rollout.function)


def start(
    config: Config,
    precision: str,
    judge: "Judge | None",
    cursor: "Cursor",
    asked_to_stop: Callable[[], bool],
    weights: Callable[[], Iterator[Bucket]],
    note: Callable[[str], None],
) -> tuple[Engine | ServedEngine | NoEngine, Sampler | ServedSampler | Replay]:
    """The engine and the sampler of a training run, as replay and rollout.mode say: of one interface. Their first weights come by
    sampler.sync.

    precision is "fp32", "bf16" or "fp16"; weights() streams the trainer's, a collective; note is told of servers that come and go.
    """
    if config.replay:
        nothing = NoEngine()
        return nothing, Replay(nothing, config)
    if config.rollout.mode == "served":
        served = ServedEngine(config, weights, asked_to_stop, note)
        return served, ServedSampler(served, judge, cursor, config)
    window = max_model_len(config)
    engine = Engine(config.model.path, config.rollout, window, precision, config.seed, asked_to_stop, weights_follow=True)
    return engine, Sampler(engine, judge, cursor, config)

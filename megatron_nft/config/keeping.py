"""How many checkpoints a run keeps."""

from megatron_nft.config.settings import Config


def best_kept(config: Config) -> int:
    """checkpoint.keep_best, or what is right where it is not set."""
    settings, evaluation = config.checkpoint, config.evaluation
    validated = bool(evaluation.sets and evaluation.interval) and settings.interval % evaluation.interval == 0
    return int(validated) if settings.keep_best is None else settings.keep_best

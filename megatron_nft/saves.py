"""The checkpoints of a run: saved while it goes on, scored, pruned, and told of."""

import logging
from pathlib import Path

from megatron_nft import policy, watchdog
from megatron_nft.config import Config, best_kept, dataset_name, samplings, set_sampling
from megatron_nft.errors import UserError
from megatron_nft.logbook import Logbook, duration
from megatron_nft.policy import checkpoint

_log = logging.getLogger(__name__)

DIRECTORY = "checkpoints"


def directory_of(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint after a step is."""
    return Path(run_dir) / DIRECTORY / f"step_{step}"


def best_metric(config: Config) -> str | None:
    """The key in metrics.jsonl that says which checkpoint is best: checkpoint.best_metric, or avg@k (greedy where k is 0) of the first
    validation set; None where there is none."""
    sets = config.evaluation.sets
    if config.checkpoint.best_metric or not sets:
        return config.checkpoint.best_metric
    k = set_sampling(config, sets[0]).k
    return f"validation/{dataset_name(sets[0])}/" + (f"avg@{k}" if k else "greedy")


class Saves:
    """All methods are collective. A save that fails is told of and tried again at the next interval: the last good one stays. Only after
    the last one it is an error."""

    def __init__(self, model: policy.Policy, config: Config, log: Logbook, is_first: bool):
        self.model, self.config, self.log, self.is_first = model, config, log, is_first
        self.run_dir, self.metric = Path(config.run_dir), best_metric(config)
        self.failed: checkpoint.Saved | None = None  # the last save, where it was not complete
        if is_first:
            checkpoint.sweep(self.run_dir)

    def start(self, state: dict, scores: dict[str, float] | None = None, more: checkpoint.Files | None = None) -> None:
        """Save the state after state["step"]; scores: the metrics of its validation, if it had one; more: as in Policy.start_save. Waits
        for the save before it, and with checkpoint.async_save off for this one, too."""
        self.finish()
        score = (scores or {}).get(self.metric)
        state = state if score is None else state | {"score": score}
        self.model.start_save(directory_of(self.run_dir, state["step"]), state, self._prune, more)
        if not self.config.checkpoint.async_save:
            self.finish()

    def poll(self) -> None:
        """Once a step: end the save under way where it is written."""
        if self.model.saving:
            with self.log.stage("checkpoint"):
                self.finish(wait=False)

    def finish(self, wait: bool = True) -> None:
        """End the save under way where it is written, or wait until it is."""
        saved = self.model.finish_save(wait)
        if saved is None:
            return
        self.failed = saved if saved.problem else None
        name = saved.directory.name
        watchdog.beat()
        if saved.problem:
            self.log.note(f"{name} could not be saved, the run goes on without: {saved.problem}")
            return
        self.log.add({"time/checkpoint_write": saved.seconds})
        self.log.note(f"{name} saved in {duration(saved.seconds)}, of which the run waited {duration(saved.stalled)}{self._best()}")

    def _prune(self) -> None:
        """Delete what is not kept; what cannot be deleted stays, and is no reason to end a run."""
        try:
            checkpoint.prune(self.run_dir, self.config.checkpoint.keep, best_kept(self.config))
        except OSError as error:
            _log.warning("a checkpoint that is not kept could not be deleted: %s", error)

    def end(self) -> None:
        """After the last save of the run. Raises UserError where it failed."""
        self.finish()
        if self.failed:
            raise checkpoint.failed(self.failed)

    def _best(self) -> str:
        if not (self.is_first and best_kept(self.config)):
            return ""
        best = checkpoint.best(self.run_dir, 1)
        return f"; best: {best[0].name}, {self.metric} {checkpoint.score_of(best[0]):.1%}" if best else f"; none has {self.metric} yet"


def check(config: Config) -> None:
    """Raise UserError where the best checkpoint is to be kept and nothing could tell which it is."""
    settings, evaluation = config.checkpoint, config.evaluation
    if not best_kept(config):
        return
    if not (evaluation.sets and evaluation.interval):
        raise UserError(f"checkpoint.keep_best is {settings.keep_best}, and there is no validation", "name evaluation.sets, or use 0")
    if settings.interval % evaluation.interval:
        raise UserError(
            f"checkpoint.keep_best is {settings.keep_best}, but not every checkpoint is validated: checkpoint.interval "
            f"({settings.interval}) is no multiple of evaluation.interval ({evaluation.interval})",
            "choose intervals that divide",
        )
    known = [f"validation/{name}/{kind}" for name, sampling in samplings(config).items() for kind in sampling.accuracies]
    if best_metric(config) not in known:
        raise UserError(f"checkpoint.best_metric {best_metric(config)} is no metric of this run", f"use one of {', '.join(known)}")

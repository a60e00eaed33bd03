"""Training from the answers that another run saved: no engine, no verdicts to be waited for, the same groups in the same order.

What debugs an objective: with the settings of the run the weights are the same, bit for bit.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.logbook import step_files
from megatron_nft.rollout.record import read_first_rows, read_rollouts
from megatron_nft.rollout.sampler import Rollout
from megatron_nft.trajectories import OUTCOMES, Group, Prompt
from megatron_nft.weights import Bucket, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_replay(config: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UserError where config.replay lacks answers of a step, or has those of another model, tokenizer or temperature."""
    run_dir = Path(config.replay)
    if run_dir.resolve() == Path(config.run_dir).resolve():
        raise UserError(f"replay and run_dir are both {config.run_dir}", "choose another run_dir: this one's answers would be overwritten")
    files = step_files(run_dir)
    if not (run_dir / "config.yaml").is_file() or not files:
        raise UserError(f"replay is {run_dir}, where no run has saved its answers", "give the run_dir of a training with rollout.save")
    missing = next((step for step in range(1, config.train.steps + 1) if not _complete(files.get(step, []))), None)
    if missing is not None:
        mend = f"set train.steps={missing - 1}" if missing > 1 else "restore its files, or replay another run"
        raise UserError(f"replay: {run_dir} has no answers of step {missing} of {config.train.steps}", mend)
    _check_settings(config, run_dir)
    _check_tokens(files[min(files)], config, tokenizer)


def _complete(files: list[Path]) -> bool:
    """One file, or those of all engines."""
    names = [path.stem.partition("-")[2] for path in files]
    return names in ([""], [str(engine) for engine in range(len(files))]) and bool(files)


def _check_settings(config: Config, run_dir: Path) -> None:
    from omegaconf import OmegaConf

    theirs = OmegaConf.load(run_dir / "config.yaml")
    model = Path(str(OmegaConf.select(theirs, "model.path")))
    if model.resolve() != Path(config.model.path).resolve() and not _same_model(model, Path(config.model.path)):
        raise UserError(f"replay: {run_dir} is of the model {model}, model.path is {config.model.path}", "set model.path to that one")
    temperature = OmegaConf.select(theirs, "rollout.temperature")
    if temperature != config.rollout.temperature:
        raise UserError(
            f"replay: {run_dir} sampled at temperature {temperature}, rollout.temperature is {config.rollout.temperature}",
            f"set rollout.temperature={temperature}: log-probs are those of what is sampled from",
        )


def _same_model(one: Path, other: Path) -> bool:
    """Two places of models of one make."""
    return all((path / "config.json").is_file() for path in (one, other)) and read_json(one / "config.json") == read_json(
        other / "config.json"
    )


def _check_tokens(files: list[Path], config: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
    """The tokens of the first answers give their texts."""
    for row in (row for path in files for row in read_first_rows(path, 8)):
        if tokenizer.decode(row["tokens"], skip_special_tokens=True) != row["response"]:
            raise UserError(
                f"replay: the tokens in {config.replay} are not those of the tokenizer in {config.model.path}",
                "set model.path to the model of that run",
            )


def check_resumed(config: Config, state: dict) -> None:
    """Raise UserError where a replay would go on as a run, or a run as a replay. state: of the sampler, in the checkpoint."""
    replayed = "replay" in state
    if replayed != (config.replay is not None):
        kind, mend = ("a replay", "set replay") if replayed else ("a run that sampled its answers", "leave replay out")
        raise UserError(f"run_dir {config.run_dir} holds {kind}", f"{mend}, or choose another run_dir")


class NoEngine:
    """In an engine's place where nothing is sampled: each process is one, so that all of them have a share of what was saved."""

    rounds_head = False

    def __init__(self) -> None:
        self.count, self.index, self.is_first = dist.get_world_size(), dist.get_rank(), True

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sleep(self, level: int = 2) -> None:
        """There is nothing to lay to sleep,"""

    def wake(self) -> None:
        """or to wake,"""

    def scale_cache_by(self, prompts: list[Prompt]) -> None:
        """or to measure,"""

    def close(self) -> None:
        """or to close."""


class Replay:
    """A sampler whose answers are those that a run saved, with the sampler's interface; every process has an equal share of the groups."""

    def __init__(self, engine: NoEngine, config: Config):
        self._engine, self._files = engine, step_files(config.replay)

    def groups(self, step: int) -> Rollout:
        """The groups that the run trained on in this step. Collective."""
        own = [group for path in self._files[step] for group in read_rollouts(path, self._engine.index, self._engine.count)]
        own.sort(key=lambda group: group.position)
        groups = sorted(group for part in self._engine.gather([_told(group) for group in own]) for group in part)
        return Rollout(own, _statistics(groups), 0.0, [] if groups else ["no group was saved: no update in this step"])

    def sync(self, buckets: Iterator[Bucket], version: int) -> bool:
        """The weights are nobody's but the trainer's: the stream is not begun, on any rank."""
        return False

    def close(self) -> None:
        """Nothing runs."""

    def state_dict(self) -> dict:
        """Tells a checkpoint what it is of."""
        return {"replay": True}

    def load(self, state: dict, directory: Path) -> None:
        """A step hangs on none before it."""

    def carried(self) -> list[Group]:
        """Nothing goes on from one step to the next."""
        return []

    def write_carried(self, directory: Path, groups: list[Group]) -> list[Path]:
        """So there is nothing to write."""
        return []


def _told(group: Group) -> tuple[int, list[tuple[float, int, bool, str]]]:
    """What the other processes learn of a group: its position, and of each answer verdict, tokens, whether it was cut off, outcome."""
    return group.position, [
        (r.verdict.score, len(r.token_ids), r.finish_reason == "length", r.verdict.outcome) for r in group.responses
    ]  # fmt: skip


def _statistics(groups: list[tuple[int, list]]) -> dict[str, float]:
    """Of the saved groups, which are the kept ones alone, under the sampler's names."""
    scores, lengths, cut, outcomes = zip(*(answer for _, group in groups for answer in group)) if groups else ((), (), (), ())
    rates = [sum(score for score, *_ in group) / len(group) for _, group in groups]
    counts = Counter(outcomes)
    return {
        "kept_correct_rate": sum(rates) / max(len(rates), 1),
        "groups_kept": len(groups),
        "response_length": sum(lengths) / max(len(scores), 1),
        "truncated_share": sum(cut) / max(len(scores), 1),
        "sampled_tokens": sum(lengths),
        **{f"outcome/{name}": counts[name] for name in OUTCOMES},
    }

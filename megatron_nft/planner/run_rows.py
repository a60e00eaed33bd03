"""What a run measured of itself: medians over the steps of its metrics.jsonl, the workload it really had, and on what it ran."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import yaml

from megatron_nft.config import Config, known_keys
from megatron_nft.errors import UserError
from megatron_nft.logbook import MACHINE, METRICS, read_rows
from megatron_nft.planner.workload import Workload

LEFT_OUT = 2  # first steps, in which kernels are compiled, chosen and captured, and memory is asked for the first time
NEEDED = ("time/step", "tokens")  # of each step
# Settings of a run that make none of its time and memory
_NO_MATTER = (
    "plan.",
    "run_dir",
    "preset",
    "resume",
    "logging.",
    "profile.",
    "data.train",
    "evaluation.sets",
    "model.path",
    "checkpoint.keep",
)


@dataclass(frozen=True)
class Answered:
    """The workload of the steps, on average."""

    response: float  # tokens of an answer
    kept_response: float  # of one that was trained on
    prompt: float | None  # tokens; None: the run does not tell
    mixed: float  # share of the groups that were decided
    sent: float  # groups of a step
    kept: float
    sampled: float  # tokens of a step


class RunRows:
    """The steps of a run, the first LEFT_OUT not among them."""

    def __init__(self, run_dir: Path):
        """Raises UserError where there is no run, or not enough of one."""
        if not (run_dir / METRICS).is_file():
            raise UserError(f"no {METRICS} in {run_dir}", "give the run_dir of a training")
        rows = [row for row in read_rows(run_dir / METRICS) if _number(row, "step") and row["step"] > 0]
        for row in rows:
            if missing := [key for key in NEEDED if not _number(row, key)]:
                raise UserError(f"step {row['step']} of {run_dir / METRICS} has no {missing[0]}", "give the run_dir of a training")
        self.run_dir, self.rows = run_dir, rows[LEFT_OUT:]
        if not self.rows:
            raise UserError(f"{run_dir} has {len(rows)} steps, of which the first {LEFT_OUT} do not count", "let it run longer")
        self.machine = self._machine()

    def _machine(self) -> dict:
        """{"device", "ranks", "kernels", "parameters"}; empty where the run did not write it down."""
        file = self.run_dir / MACHINE
        try:
            found = json.loads(file.read_text()) if file.is_file() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{file} is damaged", "remove it, and give --any-device")
        return found

    def median(self, key: str) -> float | None:
        """Over the steps that have it: validation and saves are in some of them. None: no step has it."""
        values = [float(row[key]) for row in self.rows if _number(row, key)]
        return median(values) if values else None

    def bare_seconds(self) -> float:
        """Median of a step without validation and saves."""
        return median(row["time/step"] - row.get("time/validate", 0.0) - row.get("time/checkpoint", 0.0) for row in self.rows)

    def tokens_per_second(self) -> float:
        """Median of sampled tokens over the seconds of bare_seconds()."""
        rates = (row["tokens"] / (row["time/step"] - row.get("time/validate", 0.0) - row.get("time/checkpoint", 0.0)) for row in self.rows)
        return median(rates)

    def answered(self, n: int) -> Answered | None:
        """n: answers of a group. None where the rows do not tell, as those of a replay."""
        means = {name: self._mean(f"train/{name}") for name in
                 ("response_length", "kept_response_length", "mixed_share", "prompts_sent", "groups_kept")}  # fmt: skip
        if any(value is None for value in means.values()) or not means["response_length"]:
            return None
        kept = means["kept_response_length"] or means["response_length"]
        return Answered(means["response_length"], kept, self._prompt(n), means["mixed_share"], means["prompts_sent"],
                        means["groups_kept"], self._mean("tokens") or 0.0)  # fmt: skip

    def _mean(self, key: str) -> float | None:
        values = [float(row[key]) for row in self.rows if _number(row, key)]
        return sum(values) / len(values) if values else None

    def _prompt(self, n: int) -> float | None:
        """Tokens of a prompt: what engines read, over the answers that were begun. Not told where answers go on from step to step."""
        if any(row.get("train/carried_groups") for row in self.rows):
            return None
        engines = sum(bool(re.fullmatch(r"engine/\d+/tokens_per_second", key)) for key in self.rows[0])
        read = sum(row.get("engine/prompt_tokens", 0.0) for row in self.rows) * engines
        begun = n * sum(row.get("train/prompts_sent", 0) for row in self.rows)
        return read / begun if read and begun else None

    def other_settings(self, config: Config) -> list[str]:
        """Keys of settings that the run had otherwise, and that could matter."""
        file = self.run_dir / "config.yaml"
        try:
            saved = yaml.safe_load(file.read_text()) if file.is_file() else {}
        except (yaml.YAMLError, ValueError) as error:  # no YAML, no UTF-8
            raise UserError(f"{file} is damaged", "remove it: the comparison then says nothing of settings") from error
        now = asdict(config)
        keys = [key for key in known_keys() if not key.startswith(_NO_MATTER)]
        return [key for key in keys if (old := _value(saved, key)) is not _ABSENT and old != _value(now, key)]


def _number(row: dict, key: str) -> bool:
    """Whether the row has a number of that name."""
    return isinstance(row.get(key), int | float) and not isinstance(row[key], bool)


_ABSENT = object()


def _value(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part, _ABSENT) if isinstance(tree, dict) else _ABSENT
    return tree


def with_workload(config: Config, length: float, answered: Answered) -> Config:
    """The settings with the run's own workload in plan.*: answers of `length` tokens on average, after the cut."""
    plan = replace(
        config.plan,
        mixed_share=min(max(answered.mixed, 0.01), 1.0),
        mean_prompt_length=max(round(answered.prompt), 1) if answered.prompt else config.plan.mean_prompt_length,
    )
    config = replace(config, plan=plan)
    plan.mean_response_length = _before_the_cut(config, min(length, config.rollout.max_tokens))
    return config


def _before_the_cut(config: Config, wanted: float) -> float:
    """Mean of the lengths that, cut at rollout.max_tokens, are `wanted` on average. Where nearly all are cut, as long as is looked for."""

    def cut(mean: float) -> float:
        own = replace(config.plan, mean_response_length=mean)
        return Workload.of(replace(config, plan=own)).mean_length

    low, high = 1e-3, 64.0 * config.rollout.max_tokens
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cut(middle) < wanted else (low, middle)
    return high

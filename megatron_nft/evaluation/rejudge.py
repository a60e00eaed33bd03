"""New verdicts for saved answers, without a model."""

import json
import shutil
from pathlib import Path

from megatron_nft.config import Config, SetSampling, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation.answers import Answers
from megatron_nft.evaluation.command import publish
from megatron_nft.evaluation.files import free_name, write_whole
from megatron_nft.evaluation.scores import mean_of_sets, set_result
from megatron_nft.evaluation.source import find, name_of
from megatron_nft.rewards import Judge

AT_A_TIME = 4096  # answers that wait for verdicts


def rejudge(config: Config, name: str | None = None) -> str:
    """Judge the saved answers of evaluation NAME again, by the verdict functions as they are: that of the set in the config, where it has
    one for all of its rows, else that which the problem had, else reward.function. Returns what is to be printed.

    Results and answers are replaced when all verdicts are there; the old NAME.json goes to NAME.json.1. Raises UserError where there is no
    such evaluation, or it is not finished.
    """
    name = name or _only(config)
    directory = kept.directory_of(config.run_dir, name)
    settings = kept.read_settings(directory)
    _finished(directory, settings)
    functions = {dataset_name(dataset): dataset.reward for dataset in config.evaluation.sets if not dataset.rewards}
    try:
        with Judge.for_config(config) as judge:
            changed, number, rewards = _judge_files(directory, judge, functions, config.reward.function)
    except BaseException:
        for file in directory.glob("*.judged"):
            file.unlink()
        raise
    for file in kept.files(directory):
        (directory / f"{file.name}.judged").replace(file)
    for of_set, names in rewards.items():
        settings["sets"][of_set]["reward"] = ", ".join(sorted(names))
    write_whole(directory / "settings.json", json.dumps(settings, indent=1) + "\n")
    result = directory.with_name(f"{name}.json")
    old = json.loads(result.read_text()) if result.is_file() else {}
    said = f"{changed:,} of {number:,} verdicts changed"
    if old:
        said += f"; the old results are in {shutil.copyfile(result, free_name(result))}"
    return f"{said}\n{publish(config.run_dir, name, _summary(directory, settings, old))}"


def _only(config: Config) -> str:
    """The evaluation of model.path, or the only one that is there."""
    folder = Path(config.run_dir) / "evaluations"
    names = sorted(path.name.removesuffix(".answers") for path in folder.glob("*.answers"))
    if config.evaluation.name:
        return config.evaluation.name
    if len(names) == 1:
        return names[0]
    of_model = name_of(find(Path(config.model.path), config.evaluation.checkpoint)) if Path(config.model.path).is_dir() else None
    if of_model in names:
        return of_model
    raise UserError(f"which evaluation of {config.run_dir} is meant is not clear", f"give --rejudge one of {', '.join(names) or 'none'}")


def _finished(directory: Path, settings: dict) -> None:
    """Raise UserError where a problem has not all of its answers."""
    answers = Answers(directory, _wanted(settings))
    missing = len(_wanted(settings)) - len(answers.done)
    if missing:
        raise UserError(f"{directory} lacks the answers to {missing} problems", "let `megatron-nft evaluate` finish it first")


def _wanted(settings: dict) -> dict[tuple[str, int], int]:
    return {(name, i): one["greedy"] + one["k"] for name, one in settings["sets"].items() for i in range(one["problems"])}


def _judge_files(directory: Path, judge: Judge, functions: dict, default: str) -> tuple[int, int, dict[str, set[str]]]:
    """Write NAME.parquet.judged beside each file; how many verdicts changed, of how many, and the functions by set."""
    changed = number = 0
    rewards: dict[str, set[str]] = {}
    for file in kept.files(directory):
        rows = kept.read(file)
        for row in rows:
            row["reward"] = functions.get(row["set"]) or row["reward"]
            rewards.setdefault(row["set"], set()).add(row["reward"] or default)
        for first in range(0, len(rows), AT_A_TIME):
            some = rows[first : first + AT_A_TIME]
            asked = [judge.submit(row["response"], kept.prompt_of(row)) for row in some]
            for row, verdict in zip(some, (one.result() for one in asked), strict=True):
                changed += (row["verdict"], row["outcome"]) != (verdict.score, verdict.outcome)
                row |= {"verdict": verdict.score, "outcome": verdict.outcome, "found": verdict.found}
        number += len(rows)
        kept.write(directory / f"{file.name}.judged", rows)
    return changed, number, rewards


def _summary(directory: Path, settings: dict, old: dict) -> dict:
    """The results of all sets that have answers, with what the old ones told of the model and the data."""
    told = Answers(directory, _wanted(settings)).told
    samplings = {name: SetSampling(**{key: one[key] for key in SetSampling.__dataclass_fields__}) for name, one in settings["sets"].items()}
    sets = {}
    for name, sampling in samplings.items():
        own = settings["sets"][name]
        dropped = old.get("sets", {}).get(name, {}).get("dropped")
        about = {"settings": {key: own[key] for key in (*SetSampling.__dataclass_fields__, "reward")}, "fingerprint": own["fingerprint"]}
        result = set_result(sorted((one for one in told if one.set == name), key=lambda one: one.position), sampling)
        sets[name] = about | ({"dropped": dropped} if dropped else {}) | result
    about = {"label": settings["model"], "seed": settings["seed"], "weight_version": old.get("weight_version", 0)}
    return about | {"mean": mean_of_sets(sets, samplings), "sets": sets}

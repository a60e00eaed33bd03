"""New verdicts for saved answers, without a model."""

import json
import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from megatron_nft.config import Config, SetSampling, dataset_name
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation import compare
from megatron_nft.evaluation.command import judged_by, publish
from megatron_nft.evaluation.files import free_names, in_work, swap
from megatron_nft.evaluation.scores import mean_of_sets, set_result
from megatron_nft.evaluation.source import find, name_of
from megatron_nft.files import write_whole
from megatron_nft.rewards import Judge

_OF_A_SET = {*SetSampling.__dataclass_fields__, "problems", "fingerprint", "reward"}
AT_A_TIME = 4096  # answers that wait for verdicts


def rejudge(config: Config, name: str | None = None) -> str:
    """Judge the saved answers of evaluation NAME again, by the verdict functions as they are: that of the set in the config, where it has
    one for all of its rows, else that which the problem had, else reward.function. Returns what is to be printed.

    Sets that are not finished keep their verdicts. Results and answers are replaced when all verdicts are there; the old NAME.json goes to
    NAME.json.1. Raises UserError where there is no such evaluation, another process is at it, or no set is finished.
    """
    name = name or _only(config)
    directory = kept.directory_of(config.run_dir, name)
    if not directory.parent.is_dir():
        raise kept.nothing_at(directory)
    with kept.held(directory):
        return _rejudge(config, name, directory)


def _rejudge(config: Config, name: str, directory: Path) -> str:
    settings = kept.read_settings(directory)
    if not ({"model", "seed"} <= settings.keys() and all(one.keys() >= _OF_A_SET for one in settings["sets"].values())):
        raise UserError(f"{directory / 'settings.json'} is damaged (it lacks settings)", "evaluate again with resume=false")
    missing = _missing(directory, settings)
    finished = settings["sets"].keys() - missing.keys()
    if not finished:
        lacks = sum(missing.values())
        raise UserError(f"{directory} lacks the answers to {lacks} problems", "let `megatron-nft evaluate` finish it first")
    functions = {dataset_name(dataset): dataset.reward for dataset in config.evaluation.sets if not dataset.rewards}
    try:
        shutil.copytree(directory, in_work(directory), ignore=shutil.ignore_patterns("*.parquet", "settings.json"))
        with Judge.for_config(config, training=False) as judge:
            changed, number, rewards = _judge_files(directory, judge, finished, functions, config.reward.function)
        for of_set, names in rewards.items():
            settings["sets"][of_set] |= judged_by(names, config)
        write_whole(in_work(directory) / "settings.json", json.dumps(settings, indent=1) + "\n")
        swap(directory)
    finally:
        shutil.rmtree(in_work(directory), ignore_errors=True)
    said = [f"{changed:,} of {number:,} verdicts changed"]
    result = directory.with_name(f"{name}.json")
    if result.is_file():
        said.append(f"the old results are in {shutil.copyfile(result, *free_names(result))}")
    said += [f"{of_set} is not finished (it lacks {lacks} problems) and was left as it is" for of_set, lacks in missing.items()]
    return f"{'; '.join(said)}\n{publish(config.run_dir, name, _summary(directory, settings, finished, result))}"


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


def _missing(directory: Path, settings: dict) -> dict[str, int]:
    """How many problems have not all of their answers, of each set that has such."""
    return dict(Counter(of_set for of_set, _ in _wanted(settings).keys() - kept.known(directory, _wanted(settings)).done))


def _wanted(settings: dict) -> dict[tuple[str, int], int]:
    return {(name, i): one["greedy"] + one["k"] for name, one in settings["sets"].items() for i in range(one["problems"])}


def _judge_files(directory: Path, judge: Judge, sets: Collection[str], functions: dict[str, str | None],
                 default: str) -> tuple[int, int, dict[str, set[str]]]:  # fmt: skip
    """Write the files anew, into in_work(directory); how many verdicts of these sets changed, of how many, and the functions by set."""
    changed = number = 0
    rewards: dict[str, set[str]] = {}
    for file in kept.files(directory):
        rows = kept.readable(file)
        own = [row for row in rows if row["set"] in sets]
        for row in own:
            row["reward"] = functions.get(row["set"]) or row["reward"]
            rewards.setdefault(row["set"], set()).add(row["reward"] or default)
        changed, number = changed + _judge(own, judge), number + len(own)
        if rows:
            kept.write(in_work(directory) / file.name, rows)
        else:  # damaged
            shutil.copyfile(file, in_work(directory) / file.name)
    return changed, number, rewards


def _judge(rows: list[dict], judge: Judge) -> int:
    """Give the rows new verdicts; how many changed."""
    changed = 0
    for first in range(0, len(rows), AT_A_TIME):
        some = rows[first : first + AT_A_TIME]
        asked = [judge.submit(row["response"], kept.prompt_of(row)) for row in some]
        for row, verdict in zip(some, (one.result() for one in asked), strict=True):
            changed += (row["verdict"], row["outcome"]) != (verdict.score, verdict.outcome)
            row |= {"verdict": verdict.score, "outcome": verdict.outcome, "found": verdict.found}
    return changed


def _summary(directory: Path, settings: dict, finished: Collection[str], result: Path) -> dict:
    """The results of the sets that are finished, with what the old ones told of the model and the data."""
    try:
        old = compare.read(result)
    except (FileNotFoundError, UserError):
        old = {}
    told, sets = kept.known(directory, _wanted(settings)).told, {}
    given = {name: one for name, one in settings["sets"].items() if name in finished}
    samplings = {name: SetSampling(**{key: one[key] for key in SetSampling.__dataclass_fields__}) for name, one in given.items()}
    for name, sampling in samplings.items():
        own = given[name]
        dropped = old.get("sets", {}).get(name, {}).get("dropped")
        about = {"settings": {key: own[key] for key in (*SetSampling.__dataclass_fields__, "reward")}, "fingerprint": own["fingerprint"]}
        numbers = set_result(sorted((one for one in told if one.set == name), key=lambda one: one.position), sampling)
        sets[name] = about | ({"dropped": dropped} if dropped else {}) | numbers
    about = {"label": settings["model"], "seed": settings["seed"], "weight_version": old.get("weight_version", 0)}
    return about | {"mean": mean_of_sets(sets, samplings), "sets": sets}

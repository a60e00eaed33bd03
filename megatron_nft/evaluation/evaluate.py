"""One evaluation on an engine: in a training as its validation, and by itself.

Problems are spread over the engines and every one counts.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft import watchdog
from megatron_nft.config import Config, SetSampling, dataset_name, samplings
from megatron_nft.evaluation.problems import Problem, all_problems, by_kind, requests
from megatron_nft.evaluation.scores import Answered, mean_of_sets, set_result
from megatron_nft.files import write_whole
from megatron_nft.prompts import PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.rollout import Engine
from megatron_nft.rollout.verdicts import answer
from megatron_nft.trajectories import Group, Response

if TYPE_CHECKING:
    from megatron_nft.evaluation.answers import Answers


@dataclass
class Evaluation:
    """What an evaluation found."""

    summary: dict  # of all engines, as it is written to evaluations/NAME.json

    def metrics(self) -> dict[str, float]:
        """The accuracies, under their names in metrics.jsonl: validation/<set>/greedy and validation/<set>/avg@<k>."""
        return {
            f"validation/{name}/{key}": value
            for name, result in self.summary["sets"].items()
            for key, value in result.items()
            if key == "greedy" or (key.startswith("avg@") and not key.endswith("_interval"))
        }


def validate(engine: Engine, judge: Judge | None, prompt_sets: dict[str, PromptSet], config: Config, step: int) -> dict[str, float]:
    """The validation of a training step: writes run_dir/evaluations/step_N.json, returns the metrics. A collective call."""
    result = evaluate(engine, judge, prompt_sets, config, f"step {step}", lambda *_: watchdog.beat())
    if engine.is_first and engine.index == 0:
        write_results(config.run_dir, f"step_{step}", result.summary)
    return result.metrics()


def evaluate(
    engine: Engine,
    judge: Judge | None,
    prompt_sets: dict[str, PromptSet],
    config: Config,
    label: str,
    on_finish: Callable[[int, Response], None] | None = None,
    answers: "Answers | None" = None,
    window: int | None = None,
) -> Evaluation:
    """Answer every problem of every set as config.evaluation says, with the stop strings and the rollout function of training. A collective
    call; the summary is the same on every rank.

    label (a step, a model's name) is noted in the summary; on_finish(index, response) is called as this engine's answers finish,
    `answers_expected` of them. answers: where they are kept; problems that are answered there are not answered again. window: of the
    engine, where a prompt may be so long that it leaves no room for the longest answer. The judge may be None on ranks that are not their
    engine's first.
    """
    own = own_problems(engine, prompt_sets, config, answers)
    asked = [requests(problem, config.seed, tuple(config.rollout.stop), window) for problem in own]
    told: list[Answered] = []

    def take(index: int, group: Group) -> None:
        """Of a problem's answers only what is told of them stays in memory: the text of all would be gigabytes."""
        problem = own[index]
        kinds = by_kind(problem, group)
        told.extend(Answered.of(problem.key, problem.prompt.id, kind, responses) for kind, responses in kinds.items())
        if answers is not None:
            answers.add(problem.key, problem.prompt, kinds)
        for response in group.responses:
            response.token_ids, response.logprobs, response.text = [], [], ""

    try:
        flush = None if answers is None else answers.flush
        answer(engine, judge, [problem.prompt for problem in own], asked, on_finish, config.rollout.function, take, flush)
    finally:
        if answers is not None:
            answers.flush()
    every = [one for part in engine.gather(told) for one in part] + (answers.known.told if answers is not None else [])
    settings = {"seed": config.seed, "weight_version": engine.weight_version}
    return Evaluation(summarise(label, every, prompt_sets, config, settings))


def summarise(label: str, answered: list[Answered], prompt_sets: dict[str, PromptSet], config: Config, settings: dict) -> dict:
    """All that is told of an evaluation. Raises RuntimeError where not every problem is answered, once."""
    sampled, sets = samplings(config), {}
    defaults = {dataset_name(dataset): dataset.reward or config.reward.function for dataset in config.evaluation.sets}
    for name, prompts in prompt_sets.items():
        own = sorted((one for one in answered if one.set == name), key=lambda one: one.position)
        _check_complete(name, own, len(prompts), sampled[name])
        rewards = {prompt.reward or defaults[name] for prompt in prompts}
        about = {"settings": asdict(sampled[name]) | {"reward": ", ".join(sorted(rewards))}, "fingerprint": prompts.fingerprint}
        dropped = {reason: number for reason, number in prompts.dropped.items() if number}
        sets[name] = about | ({"dropped": dropped} if dropped else {}) | set_result(own, sampled[name])
    return {"label": label, **settings, "mean": mean_of_sets(sets, {name: sampled[name] for name in sets}), "sets": sets}


def _check_complete(name: str, answered: list[Answered], problems: int, sampling: SetSampling) -> None:
    for kind, number in (("greedy", int(sampling.greedy)), ("sampled", sampling.k)):
        found = [(one.position, len(one.scores)) for one in answered if one.kind == kind]
        if found != [(i, number) for i in range(problems if number else 0)]:
            raise RuntimeError(f"the {kind} answers to the {problems} problems of {name} are not all there, or some are there twice")


def own_problems(engine: Engine, prompt_sets: dict[str, PromptSet], config: Config, answers: "Answers | None" = None) -> list[Problem]:
    """Of this engine: every engines-th of all sets in a row, those left out that are answered."""
    every = all_problems(prompt_sets, config)
    left = every if answers is None else [problem for problem in every if problem.key not in answers.known.done]
    return left[engine.index :: engine.count]


def answers_expected(engine: Engine, prompt_sets: dict[str, PromptSet], config: Config, answers: "Answers | None" = None) -> int:
    """How many answers this engine will write: the total of a progress bar."""
    return sum(problem.sampling.answers for problem in own_problems(engine, prompt_sets, config, answers))


def write_results(run_dir: str | Path, name: str, summary: dict) -> Path:
    """Write evaluations/NAME.json, complete or not at all; returns its path."""
    return write_whole(Path(run_dir) / "evaluations" / f"{name}.json", json.dumps(summary, indent=1) + "\n")

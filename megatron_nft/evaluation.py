"""Benchmarks: one greedy answer and k sampled answers a problem, accuracies with 95 % intervals.

Problems are spread over the engines and every one counts. Seeds depend on (run seed, set, problem, sample) alone, so two
validations, or two models, answer the same draws of chance.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_nft import watchdog
from megatron_nft.config import Config, EvaluationConfig, max_answer_length, max_model_len
from megatron_nft.errors import UserError
from megatron_nft.logbook import progress
from megatron_nft.prompts import PromptSet, load_sets, load_tokenizer
from megatron_nft.rewards import Judge
from megatron_nft.rollout import Engine, Request, arguments, write_rollouts
from megatron_nft.rollout.queue import seed_of
from megatron_nft.rollout.summaries import GroupSummary, summarise
from megatron_nft.rollout.verdicts import answer
from megatron_nft.trajectories import OUTCOMES, Group, Prompt, Response

RESAMPLES = 2000  # of the bootstrap


@dataclass
class Evaluation:
    """What an evaluation found."""

    summary: dict  # of all engines, as it is written to evaluations/NAME.json
    answers: dict[str, list[Group]]  # this engine's, by "<set>/greedy" and "<set>/sampled"

    def metrics(self) -> dict[str, float]:
        """The accuracies, under their names in metrics.jsonl: validation/<set>/greedy and validation/<set>/avg@<k>."""
        return {
            f"validation/{name}/{key}": value
            for name, result in self.summary["sets"].items()
            for key, value in result.items()
            if key == "greedy" or (key.startswith("avg@") and not key.endswith("_interval"))
        }


def evaluate_model(config: Config, precision: str) -> None:
    """`megatron-nft evaluate`: score the Hugging Face directory config.model.path on config.evaluation.sets.

    precision is "fp32" or "bf16". torch.distributed is started by the caller. Writes run_dir/evaluations/<model's name>.json, the
    answers beside it as parquet, and prints a table.
    """
    arguments.check(config.rollout)
    prompt_sets = load_sets(config.evaluation.sets, load_tokenizer(config.model.path), config.data)
    check(prompt_sets, config.evaluation)
    with Judge.for_config(config) as judge:
        engine = Engine(config.model.path, config.rollout, max_model_len(config), precision, config.seed)
        engine.scale_cache_by([prompt for problems in prompt_sets.values() for prompt in problems])
        tokens = max_answer_length(config)
        with progress(answers_expected(engine, prompt_sets, config.evaluation), "evaluate", "answers") as bar:
            result = evaluate(
                engine,
                judge,
                prompt_sets,
                config.evaluation,
                tokens,
                config.seed,
                config.model.path,
                lambda *_: bar.update(),
                stop=tuple(config.rollout.stop),
            )
        name = Path(config.model.path).resolve().name
        if engine.is_first:
            suffix = f"-{engine.index}" if engine.count > 1 else ""
            answers = [group for groups in result.answers.values() for group in groups]
            write_rollouts(Path(config.run_dir) / "evaluations" / f"{name}{suffix}.parquet", 0, answers)
        if engine.is_first and engine.index == 0:
            path = write_results(config.run_dir, name, result)
            print(f"{table(result)}\n{path}", flush=True)
        engine.close()


def validate(engine: Engine, judge: Judge | None, prompt_sets: dict[str, PromptSet], config: Config, step: int) -> dict[str, float]:
    """The validation of a training step: writes run_dir/evaluations/step_N.json, returns the metrics. A collective call."""
    tokens, stop = max_answer_length(config), tuple(config.rollout.stop)
    result = evaluate(
        engine, judge, prompt_sets, config.evaluation, tokens, config.seed, f"step {step}", lambda *_: watchdog.beat(), stop=stop
    )
    if engine.is_first and engine.index == 0:
        write_results(config.run_dir, f"step_{step}", result)
    return result.metrics()


def evaluate(
    engine: Engine,
    judge: Judge | None,
    prompt_sets: dict[str, PromptSet],
    evaluation: EvaluationConfig,
    max_tokens: int,
    seed: int,
    label: str,
    on_finish: Callable[[int, Response], None] | None = None,
    stop: tuple[str, ...] = (),
) -> Evaluation:
    """Answer every problem of every set. A collective call; the summary is the same on every rank.

    max_tokens bounds an answer; label (a step, a model's name) is noted in the summary; on_finish(index, response) is called as
    this engine's answers finish, `answers_expected` of them; stop: strings that end an answer. The judge may be None on ranks that are
    not their engine's first.
    """
    own = _own_problems(engine, prompt_sets, evaluation)
    requests = [_requests(prompt, name, evaluation, max_tokens, seed, stop) for name, _, prompt in own]
    groups = answer(engine, judge, [prompt for _, _, prompt in own], requests, on_finish)
    answers: dict[str, list[Group]] = {}
    parts: list[tuple[str, GroupSummary]] = []  # with the kind of answers it tells of
    for (name, position, _), group in zip(own, groups, strict=False):
        for kind, some in _by_kind(group, position, evaluation):
            answers.setdefault(f"{name}/{kind}", []).append(some)
            parts.append((f"{name}/{kind}", summarise(some)))
    summaries: dict[str, list[GroupSummary]] = {}
    for name, summary in sorted((item for part in engine.gather(parts) for item in part), key=lambda item: item[1].position):
        summaries.setdefault(name, []).append(summary)
    sets = {name: _result(name, summaries, evaluation.k) for name in prompt_sets}
    settings = {"k": evaluation.k, "temperature": evaluation.temperature, "top_p": evaluation.top_p, "max_tokens": max_tokens, "seed": seed}
    return Evaluation({"label": label, "weight_version": engine.weight_version, "settings": settings, "sets": sets}, answers)


def answers_expected(engine: Engine, prompt_sets: dict[str, PromptSet], evaluation: EvaluationConfig) -> int:
    """How many answers this engine will write: the total of a progress bar."""
    return len(_own_problems(engine, prompt_sets, evaluation)) * (evaluation.greedy + evaluation.k)


def write_results(run_dir: str | Path, name: str, evaluation: Evaluation) -> Path:
    """Write evaluations/NAME.json, complete or not at all; returns its path."""
    path = Path(run_dir) / "evaluations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(evaluation.summary, indent=1) + "\n")
    os.replace(part, path)
    return path


def table(evaluation: Evaluation) -> str:
    """The results as a plain-text table: accuracies in per cent with their 95 % intervals."""
    results = evaluation.summary["sets"]
    columns = [key for key in next(iter(results.values())) if key == "greedy" or key.partition("@")[0] in ("avg", "pass")]
    columns = [key for key in columns if not key.endswith("_interval")]
    rows = [["set", "problems", *columns, "tokens", "cut off"]]
    for name, result in results.items():
        cells = [_percent(result[key], result.get(f"{key}_interval")) for key in columns]
        rows.append([name, str(result["problems"]), *cells, f"{result['response_length']:.0f}", _percent(result["truncated_share"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent yes-or-no trials (Wilson 1927); sensible at 0 and 1, too."""
    z = 1.959964
    centre, spread = rate + z * z / (2 * count), z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def bootstrap(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over problems, by resampling problems (answers to one problem are not independent)."""
    data = numpy.asarray(values)
    generator = numpy.random.default_rng(0)
    means = [data[generator.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    low, high = numpy.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def check(prompt_sets: dict[str, PromptSet], evaluation: EvaluationConfig) -> None:
    """Raise UserError where there is nothing to do."""
    if not prompt_sets:
        raise UserError("there is no problem to evaluate on", "name data sets under evaluation.sets")
    if not (evaluation.greedy or evaluation.k):
        raise UserError("evaluation.greedy is false and evaluation.k is 0", "ask for a greedy answer or for k sampled ones")


def _own_problems(engine: Engine, prompt_sets: dict[str, PromptSet], evaluation: EvaluationConfig) -> list[tuple[str, int, Prompt]]:
    """(set, position in the set, problem) of this engine: every engines-th of all sets in a row."""
    every = [(name, position, prompt) for name, prompts in prompt_sets.items() for position, prompt in enumerate(prompts)]
    return every[engine.index :: engine.count]


def _requests(prompt: Prompt, name: str, evaluation: EvaluationConfig, max_tokens: int, seed: int, stop: tuple[str, ...]) -> list[Request]:
    """The greedy request, where asked for, and then the k sampled ones."""
    greedy = [Request(prompt.token_ids, 0.0, 1.0, max_tokens, 0, stop)] if evaluation.greedy else []
    seeds = (seed_of(seed, "evaluation", name, prompt.id, sample) for sample in range(evaluation.k))
    return greedy + [Request(prompt.token_ids, evaluation.temperature, evaluation.top_p, max_tokens, own, stop) for own in seeds]


def _by_kind(group: Group, position: int, evaluation: EvaluationConfig) -> list[tuple[str, Group]]:
    """A problem's answers parted into the greedy one and the sampled ones, as _requests ordered them."""
    first = int(evaluation.greedy)
    kinds = (("greedy", group.responses[:first]), ("sampled", group.responses[first:]))
    return [(kind, Group(group.prompt, responses, position)) for kind, responses in kinds if responses]


def _result(name: str, summaries: dict[str, list[GroupSummary]], k: int) -> dict:
    """One set's numbers; pass@k is the mean over problems of the best of k verdicts."""
    greedy, sampled = summaries.get(f"{name}/greedy", []), summaries.get(f"{name}/sampled", [])
    result: dict = {"problems": len(greedy or sampled)}
    if greedy:
        result["greedy"] = sum(s.correct_rate for s in greedy) / len(greedy)
        result["greedy_interval"] = wilson(result["greedy"], len(greedy))
    if sampled:
        rates = [s.correct_rate for s in sampled]
        result[f"avg@{k}"] = sum(rates) / len(rates)
        result[f"avg@{k}_interval"] = bootstrap(rates)
        result[f"pass@{k}"] = sum(max(s.rates) for s in sampled) / len(sampled)
    every = greedy + sampled
    lengths = [length for s in every for length in s.lengths]
    outcomes = sum((s.outcomes for s in every), Counter())
    return result | {
        "response_length": sum(lengths) / len(lengths),
        "truncated_share": sum(s.truncated for s in every) / len(lengths),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
    }


def _percent(value: float, interval: tuple[float, float] | None = None) -> str:
    return f"{100 * value:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")

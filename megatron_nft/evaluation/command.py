"""`megatron-nft evaluate`: from a model to a table, and from saved answers to new verdicts."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_nft.config import Config, dataset_name, max_answer_length, max_model_len, samplings
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation import tables
from megatron_nft.evaluation.answers import Answers, Known
from megatron_nft.evaluation.evaluate import Evaluation, answers_expected, evaluate, summarise, write_results
from megatron_nft.evaluation.problems import all_problems
from megatron_nft.evaluation.source import Source
from megatron_nft.files import write_whole
from megatron_nft.logbook import progress
from megatron_nft.prompts import PromptSet, load_sets, load_tokenizer
from megatron_nft.rewards import Judge
from megatron_nft.rewards.functions import code_of
from megatron_nft.rollout import Engine, arguments
from megatron_nft.stopping import Stopped, StopRequest
from megatron_nft.weights import load_weights

# settings of rollout that decide about answers
_OF_THE_ENGINE = ("stop", "function", "quantization", "kv_cache_dtype", "calculate_kv_scales", "speculative_config", "vllm")
_log = logging.getLogger(__name__)


def evaluate_model(config: Config, source: Source, precision: str, stop: StopRequest | None = None) -> None:
    """Score a model on config.evaluation.sets. torch.distributed is started by the caller; precision is "fp32", "bf16" or "fp16".

    Writes run_dir/evaluations/NAME.json and NAME.md, the answers to NAME.answers while it goes on, the page run_dir/report.html, and prints
    a table. Problems that NAME.answers has are not answered again. Raises Stopped where `stop` asks for it, with the answers kept.
    """
    arguments.check(config.rollout)
    prompt_sets = load_sets(config.evaluation.sets, load_tokenizer(config.model.path), replace(config.data, max_prompt_length=sys.maxsize))
    if not prompt_sets:
        raise UserError("there is no problem to evaluate on", "name data sets under evaluation.sets")
    window = window_of(prompt_sets, config)
    directory = kept.directory_of(config.run_dir, source.name)
    wanted = {problem.key: problem.sampling.answers for problem in all_problems(prompt_sets, config)}
    with ExitStack() as closing:

        def begin() -> Known:
            directory.parent.mkdir(parents=True, exist_ok=True)
            closing.enter_context(kept.held(directory))
            return kept.begin(directory, settings_of(prompt_sets, config, source, precision, window), wanted, config.resume)

        known = from_first_rank(begin)
        result = _answer(config, source, precision, prompt_sets, directory, known, window, stop)
        if is_first_rank():
            print(publish(config.run_dir, source.name, result.summary), flush=True)


def _answer(config: Config, source: Source, precision: str, prompt_sets: dict[str, PromptSet], directory: Path, known: Known, window: int,
            stop: StopRequest | None) -> Evaluation:  # fmt: skip
    """The evaluation of all problems, an engine being started where some are not answered."""
    number, label = sum(map(len, prompt_sets.values())), str(source.given)
    if is_first_rank() and known.done:
        print(f"{len(known.done)} of {number} problems are answered in {directory}", flush=True)
    if len(known.done) == number:
        return Evaluation(summarise(label, known.told, prompt_sets, config, {"seed": config.seed, "weight_version": 0}))
    with ExitStack() as closing:
        asks = int(os.environ.get("RANK", "0")) % config.rollout.tensor_parallel_size == 0  # the first rank of an engine
        judge = closing.enter_context(Judge.for_config(config, training=False)) if asks else None
        engine = Engine(config.model.path, config.rollout, window, precision, config.seed, None if stop is None else stop.agreed)
        closing.callback(engine.close)
        engine.scale_cache_by([prompt for problems in prompt_sets.values() for prompt in problems])
        if stop is not None:
            stop.begin()
        answers = Answers(directory, known, engine.index)
        title, total = "evaluate", answers_expected(engine, prompt_sets, config, answers)
        title += f", engine {engine.index}" if engine.count > 1 else ""
        bar = closing.enter_context(progress(total, title, "answers")) if engine.is_first else None
        try:
            return evaluate(engine, judge, prompt_sets, config, label, lambda *_: None if bar is None else bar.update(), answers, window)
        except Stopped:
            there = len(known.done) + sum(engine.gather(answers.added))  # every engine has written what it has by then
            raise Stopped(f"stopped on request with {there} of {number} problems answered; {stop.goes_on}") from None


def is_first_rank() -> bool:
    """Of all."""
    return os.environ.get("RANK", "0") == "0"


def from_first_rank(function: Callable[[], Any]) -> Any:
    """What the function returns on the first rank, on every rank; the UserError that it raises there likewise. A collective call."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = (error.problem, error.mend)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(*outcome[1])
    return outcome[0]


def publish(run_dir: str | Path, name: str, summary: dict) -> str:
    """Write NAME.json, NAME.md and the page; what is to be printed."""
    from megatron_nft import report  # imports matplotlib: only at the end

    path = write_results(run_dir, name, summary)
    told = [tables.plain(summary), str(path), str(write_whole(path.with_suffix(".md"), tables.markdown(name, summary) + "\n"))]
    try:
        return "\n".join([*told, str(report.write_report(run_dir))])
    except UserError as error:  # in what a training left here; the results stand
        return "\n".join([*told, f"no page: {error}"])


def window_of(prompt_sets: dict[str, PromptSet], config: Config) -> int:
    """Tokens of prompt and answer together: with the longest prompt that there is, as far as the model's own window goes; every problem
    counts, so none is too long. Raises UserError where a prompt leaves no room for an answer."""
    longest = {name: max(len(prompt.token_ids) for prompt in problems) for name, problems in prompt_sets.items()}
    own = load_weights(config.model.path).config["max_position_embeddings"]
    window = max(max_model_len(config), min(max(longest.values()) + max_answer_length(config), own))
    for name, length in longest.items():
        if length >= window:
            what = f"a problem of {name} has {length} tokens, and the model's window {own}"
            raise UserError(what, "leave the set out with evaluation.only")
        sampling = samplings(config)[name]
        if length + sampling.max_tokens > window:
            _log.warning("the longest problem of %s has %d tokens, which leaves %d for its answer", name, length, window - length)
    return window


def settings_of(prompt_sets: dict[str, PromptSet], config: Config, source: Source, precision: str, window: int) -> dict:
    """All that decides about answers and verdicts, as JSON holds it: an evaluation goes on with nothing else."""
    by_name, sets = {dataset_name(dataset): dataset for dataset in config.evaluation.sets}, {}
    for name, problems in prompt_sets.items():
        sampling = samplings(config)[name]
        texts = hashlib.sha256(json.dumps([prompt.token_ids for prompt in problems]).encode()).hexdigest()[:16]
        sets[name] = asdict(sampling) | {
            "problems": len(problems),
            "fingerprint": problems.fingerprint,
            "prompts": texts,
            "least_room": min(sampling.max_tokens, window - max(len(prompt.token_ids) for prompt in problems)),  # tokens of an answer
            **judged_by({prompt.reward or by_name[name].reward or config.reward.function for prompt in problems}, config),
        }
    settings = {
        "model": str(source.given),
        "weights": source.fingerprint(),
        "precision": precision,
        "seed": config.seed,
        **{key: getattr(config.rollout, key) for key in _OF_THE_ENGINE},
        "function_code": code_of(config.rollout.function or ""),
        "sets": sets,
    }
    return json.loads(json.dumps(settings, default=str))


def judged_by(functions: set[str], config: Config) -> dict:
    """What decides about the verdicts of a set, as settings_of has it."""
    names = sorted(functions)
    code = [found for name in names if (found := code_of(name))]
    limits = {"time_limit": config.reward.time_limit, "memory_limit": config.reward.memory_limit}
    return {"reward": ", ".join(names), "reward_code": ", ".join(code), **limits}

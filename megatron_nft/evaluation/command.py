"""`megatron-nft evaluate`: from a model to a table, and from saved answers to new verdicts."""

import hashlib
import json
import logging
import os
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from megatron_nft.config import Config, dataset_name, max_answer_length, max_model_len, samplings
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation import tables
from megatron_nft.evaluation.answers import Answers
from megatron_nft.evaluation.evaluate import Evaluation, answers_expected, evaluate, summarise, write_results
from megatron_nft.evaluation.files import write_whole
from megatron_nft.evaluation.problems import all_problems, check
from megatron_nft.evaluation.source import Source
from megatron_nft.locks import exclusive
from megatron_nft.logbook import progress
from megatron_nft.prompts import PromptSet, load_sets, load_tokenizer
from megatron_nft.rewards import Judge
from megatron_nft.rollout import Engine, arguments
from megatron_nft.stopping import Stopped, StopRequest
from megatron_nft.weights import load_weights

_log = logging.getLogger(__name__)


def evaluate_model(config: Config, source: Source, precision: str, stop: StopRequest | None = None) -> None:
    """Score a model on config.evaluation.sets. torch.distributed is started by the caller; precision is "fp32", "bf16" or "fp16".

    Writes run_dir/evaluations/NAME.json and NAME.md, the answers to NAME.answers while it goes on, the page run_dir/report.html, and prints
    a table. Problems that NAME.answers has are not answered again. Raises Stopped where `stop` asks for it, with the answers kept.
    """
    arguments.check(config.rollout)
    prompt_sets = load_sets(config.evaluation.sets, load_tokenizer(config.model.path), replace(config.data, max_prompt_length=sys.maxsize))
    check(prompt_sets, config)
    window = window_of(prompt_sets, config)
    first, directory = os.environ.get("RANK", "0") == "0", kept.directory_of(config.run_dir, source.name)
    settings = settings_of(prompt_sets, config, source, precision)
    in_use = UserError(f"{directory} is being written by another evaluation", "wait until it has ended, or set evaluation.name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(directory.parent / f".{source.name}.lock", in_use) if first else nullcontext():
        kept.begin(directory, settings, config.resume, first)
        result = _answer(config, source, precision, prompt_sets, directory, window, stop)
        if first:
            print(publish(config.run_dir, source.name, result.summary), flush=True)


def _answer(config: Config, source: Source, precision: str, prompt_sets: dict[str, PromptSet], directory: Path, window: int,
            stop: StopRequest | None) -> Evaluation:  # fmt: skip
    """The evaluation of all problems, an engine being started where some are not answered."""
    wanted = {problem.key: problem.sampling.answers for problem in all_problems(prompt_sets, config)}
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    answers = Answers(directory, wanted if config.resume else {}, rank // config.rollout.tensor_parallel_size)
    if rank == 0 and answers.done:
        print(f"{len(answers.done)} of {len(wanted)} problems are answered in {directory}", flush=True)
    if len(answers.done) == len(wanted):
        about = {"seed": config.seed, "weight_version": 0}
        return Evaluation(summarise(str(source.given), answers.told, prompt_sets, config, about))
    with ExitStack() as closing:
        judge = closing.enter_context(Judge.for_config(config))
        asked = None if stop is None else stop.agreed
        engine = Engine(config.model.path, config.rollout, window, precision, config.seed, asked)
        closing.callback(engine.close)
        engine.scale_cache_by([prompt for problems in prompt_sets.values() for prompt in problems])
        if stop is not None:
            stop.begin()
        total = answers_expected(engine, prompt_sets, config, answers)
        bar = closing.enter_context(progress(total, "evaluate" if world == 1 else f"evaluate, engine {engine.index}", "answers"))
        try:
            return evaluate(engine, judge, prompt_sets, config, str(source.given), lambda *_: bar.update(), answers, window)
        except Stopped:
            there = len(Answers(directory, wanted).done)
            said = f"stopped on request with {there} of {len(wanted)} problems answered; the same command goes on after them"
            raise Stopped(said) from None


def publish(run_dir: str | Path, name: str, summary: dict) -> str:
    """Write NAME.json, NAME.md and the page; what is to be printed."""
    from megatron_nft import report  # imports matplotlib: only at the end

    path = write_results(run_dir, name, summary)
    markdown = write_whole(path.with_suffix(".md"), tables.markdown(name, summary) + "\n")
    page = report.write_report(run_dir)
    return "\n".join([tables.plain(summary), *map(str, (path, markdown, page))])


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


def settings_of(prompt_sets: dict[str, PromptSet], config: Config, source: Source, precision: str) -> dict:
    """All that decides about answers and verdicts, as JSON holds it: an evaluation goes on with nothing else."""
    by_name = {dataset_name(dataset): dataset for dataset in config.evaluation.sets}
    sets = {}
    for name, problems in prompt_sets.items():
        texts = hashlib.sha256(json.dumps([prompt.token_ids for prompt in problems]).encode()).hexdigest()[:16]
        rewards = {prompt.reward or by_name[name].reward or config.reward.function for prompt in problems}
        sets[name] = asdict(samplings(config)[name]) | {
            "problems": len(problems), "fingerprint": problems.fingerprint, "prompts": texts, "reward": ", ".join(sorted(rewards)),
        }  # fmt: skip
    return {
        "model": str(source.given),
        "weights": source.fingerprint(),
        "precision": precision,
        "seed": config.seed,
        "stop": list(config.rollout.stop),
        "function": config.rollout.function,
        "sets": sets,
    }

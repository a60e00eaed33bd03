"""A training step on one GPU in BF16 and FP8: MFU, what FP8 gains in the layers and in the whole step, and where the time goes.

    python benchmarks/gpu/train_step.py [--models qwen2.5-1.5b qwen2.5-32b] [--layers 8] [--tokens 4096 16384] [--precisions ...]
                                        [--profile FOLDER] [--json FILE] [--seconds N] [--tiny]

Random weights of Qwen2.5's shapes (of 32B a slice of --layers layers, embedding and head whole), packed answers of uneven lengths,
--micro-batches full micro-batches a step, the optimizer's update included. Precisions are bf16, a recipe of FP8 in the hybrid format
(tensorwise, delayed, blockwise), and "bf16, gradients added apart", without Transformer Engine's accumulation of weight gradients in the
product that makes them. MFU is by the usual count (flops.py: 6 a weight and token, and the attention) of the whole step against the dense
BF16 peak, in every precision, so that rows compare; `fp8_mfu` is against the FP8 peak. `layers_seconds` are of the transformer layers'
forward and backward passes alone, `head_seconds` of the head with the loss, `optimizer_seconds` of the update.
--profile: one step of each precision at the most tokens under torch.profiler; a table of kernels by kind, as text and JSON.
Needs torch, Megatron-Core and this repository; FP8 needs Transformer Engine. --tiny: two layers, bf16 there fp32, also on a CPU.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from flops import layer_flops, peak, training_flops
from phases import Phases
from profiles import profiled

from megatron_nft import batching, objectives, policy
from megatron_nft.config import Config
from megatron_nft.errors import first_line
from megatron_nft.policy import versions

APART = "bf16, gradients added apart"
PRECISIONS = ("bf16", APART, "tensorwise", "blockwise", "delayed")
GOALS = {"qwen2.5-1.5b": ">= 0.40", "qwen2.5-32b": ">= 0.50"}  # MFU in bf16 at the most tokens
FP8_GOAL = ">= 1.4"  # of the layers


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=170)
    parser.add_argument("--models", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--layers", type=common.positive, default=8, help="of qwen2.5-32b")
    parser.add_argument("--tokens", type=common.positive, nargs="+", default=[4096, 16384])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--micro-batches", type=common.positive, default=2)
    parser.add_argument("--recompute", action="store_true", help="recompute_granularity=full")
    parser.add_argument("--steps", type=common.positive, default=3, help="timed, after two that are not")
    parser.add_argument("--profile", type=Path, metavar="FOLDER")
    return parser.parse_args()


def jobs(arguments: argparse.Namespace) -> list[dict]:
    """A model in a precision each, the small model first; what is only a comparison on the small one alone."""
    if arguments.tiny:
        return [{"model": "tiny", "layers": 2, "precision": precision} for precision in ("bf16", APART)]
    small, large = "qwen2.5-1.5b", "qwen2.5-32b"
    return [
        {"model": model, "layers": arguments.layers if model == large else None, "precision": precision}
        for model in (small, large)
        if model in arguments.models
        for precision in arguments.precisions
        if not (model == large and precision == APART)
    ]


def configure(folder: str, job: dict, arguments: argparse.Namespace) -> Config:
    config = Config(run_dir="unused")
    config.model.path = folder
    if job["precision"] not in ("bf16", APART):
        config.model.fp8, config.model.fp8_recipe = "hybrid", job["precision"]
    if torch.cuda.is_available() and job["precision"] != APART and versions.have_fused_accumulation(versions.have_transformer_engine()):
        config.megatron.transformer["gradient_accumulation_fusion"] = True
    config.train.tokens_per_micro_batch = max(arguments.tokens)
    config.train.recompute_granularity = "full" if arguments.recompute else None
    config.objective.reduction = "token-mean"
    return config


def make(config: Config, topology: policy.Topology) -> policy.Policy:
    """A policy with random weights, norms at 1."""
    model = policy.Policy(config, topology, weights=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    model.optimizer.reload_model_params()
    return model


def packed(model: policy.Policy, tokens: int, vocab: int) -> tuple[list, list[int]]:
    """A mini-batch of one full micro-batch, and the lengths of its answers: random ids, a prompt of 8 tokens and an answer each."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < tokens:  # a tenth to a half of what there is
        lengths.append(min(int(rng.integers(tokens // 10, tokens // 2)), tokens - sum(lengths)))
    lengths = [length for length in lengths if length >= 16]
    answers = {}
    for number, length in enumerate(lengths):
        ids = rng.integers(0, vocab, length).tolist()
        answers[number] = batching.TrainingAnswer(ids[:8], ids[8:], [-1.0] * (length - 8), [1] * (length - 8), float(number % 2))
    responses = np.array([len(a.response) for a in answers.values()])
    table = batching.Answers(
        np.full(len(lengths), 8), responses, responses, np.arange(len(lengths)) % 2.0, np.zeros(len(lengths)), np.zeros(len(lengths), int)
    )
    plan = batching.plan(table, model.layout(1), lambda verdicts, _: np.ones(len(verdicts)), "token-mean", 1.0)
    [batches] = model.pack(plan, answers)
    return batches, lengths


def measure_job(job: dict, topology: policy.Topology, arguments: argparse.Namespace, budget: common.Budget) -> dict:
    """Rows of one model in one precision: {"steps": [a row for each number of tokens], "kernels": ...}."""
    hf, steps = common.shape(job["model"], job["layers"]), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf))
        config = configure(folder, job, arguments)
        model = make(config, topology)
        print(f"{job['model']}, {hf['num_hidden_layers']} layers, {job['precision']}; {policy.kernels(config)}", flush=True)
        for tokens in sorted(arguments.tokens):
            config.train.tokens_per_micro_batch = tokens
            steps.append(common.row({"tokens": tokens}, partial(measure_step, model, hf, tokens, arguments, budget)))
            print(line(steps[-1]), flush=True)
        found = {"layers": hf["num_hidden_layers"], "kernels": policy.kernels(config), "steps": steps}
        if arguments.profile and "error" not in steps[-1]:
            found |= profile(model, hf, job, arguments)
    del model
    common.free()
    return found


def work_off(arguments: argparse.Namespace, budget: common.Budget) -> None:
    """All jobs of this process, on one set of Megatron's groups."""
    config = Config(run_dir="unused")
    topology = policy.initialize(config.parallel, config.seed)
    common.work_off(arguments, lambda job: measure_job(job, topology, arguments, budget))
    policy.shutdown()


def step_of(model: policy.Policy, hf: dict, tokens: int, micro_batches: int) -> tuple[Callable[[], object], list[int]]:
    """(an update, the lengths of its answers)."""
    batches, lengths = packed(model, tokens, hf["vocab_size"])
    objective = partial(objectives.loss, settings=model.config.objective)
    model.fill_old_logprobs(batches, model.config.objective)
    whole = batches * micro_batches
    return lambda: model.update(whole, objective, objectives.METRICS), lengths * micro_batches


def measure_step(model: policy.Policy, hf: dict, tokens: int, arguments: argparse.Namespace, budget: common.Budget) -> dict:
    update, lengths = step_of(model, hf, tokens, arguments.micro_batches)
    with Phases(model) as phases:
        seconds, memory = common.timed(lambda: phases.step(update), arguments.steps, budget=budget)
        parts = phases.medians(skip=2)
    done, in_layers = training_flops(hf, lengths), layer_flops(hf, lengths)
    found = {
        "micro_batches": arguments.micro_batches,
        "seconds": seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "peak_bytes": memory,
        **{f"{name}_seconds": value for name, value in parts.items()},
        "tflops": done / seconds / 1e12,
        "layers_tflops": in_layers / parts["layers"] / 1e12,
    }
    if limit := peak(common.device(), fp8=False):
        found |= {"mfu": done / seconds / limit, "layers_mfu": in_layers / parts["layers"] / limit}
    if model.config.model.fp8 and (limit := peak(common.device(), fp8=True)):
        found["fp8_mfu"] = done / seconds / limit
    return found


def profile(model: policy.Policy, hf: dict, job: dict, arguments: argparse.Namespace) -> dict:
    """{"profile": kernels of one step by kind}, also written to the folder --profile."""
    tokens = max(arguments.tokens)
    update, _ = step_of(model, hf, tokens, arguments.micro_batches)
    try:
        table = profiled(update)
    except RuntimeError as error:  # where CUPTI may not be used; what was timed stays
        print(f"no profile: {error}", flush=True)
        return {"profile_error": first_line(error)}
    name = f"{job['model']}-{job['precision'].replace(', ', '-').replace(' ', '-')}-{tokens}"
    title = f"{job['model']}, {hf['num_hidden_layers']} layers, {job['precision']}, {tokens:,} tokens x {arguments.micro_batches}"
    arguments.profile.mkdir(parents=True, exist_ok=True)
    (arguments.profile / f"{name}.txt").write_text(f"{title}, on {common.device()}\n{table.text}\n")
    (arguments.profile / f"{name}.json").write_text(json.dumps(table.found, indent=1))
    print(f"{title}\n{table.text}", flush=True)
    return {"profile": table.found}


def flat(found: list[dict]) -> list[dict]:
    """A row for each model, precision and number of tokens; one for a job of which nothing came."""
    rows = []
    for job in found:
        shared = {key: value for key, value in job.items() if key not in ("steps", "profile")}
        rows += [shared | step for step in job["steps"]] if "steps" in job else [shared]
    return rows


def ratios(rows: list[dict], models: list[str], tokens: list[int]) -> list[dict]:
    """What is asked of these rows, and what stands beside it."""
    found, most = [], max(tokens)

    def of(model: str, precision: str, count: int) -> dict | None:
        return next((r for r in rows if (r["model"], r["precision"], r.get("tokens")) == (model, precision, count)), None)

    for model in models:
        for count in sorted(tokens):
            plain = of(model, "bf16", count) or {}
            found.append(common.ratio(f"{model}, {count} tokens: MFU in BF16", plain.get("mfu"), GOALS[model] if count == most else None))
            for recipe in ("tensorwise", "blockwise", "delayed"):
                fp8 = of(model, recipe, count)
                goal = FP8_GOAL if model == "qwen2.5-32b" and count == most else None
                layers, whole = (common.quotient(plain, fp8, key) for key in ("layers_seconds", "seconds"))
                found.append(common.ratio(f"{model}, {count} tokens: FP8 {recipe} over BF16, layers", layers, goal))
                found.append(common.ratio(f"{model}, {count} tokens: FP8 {recipe} over BF16, whole step", whole))
            apart = common.quotient(of(model, APART, count), plain, "seconds")
            if apart is not None:
                found.append(common.ratio(f"{model}, {count} tokens: gradients added apart, time to together", apart))
    return _best_recipe(found)


def _best_recipe(found: list[dict]) -> list[dict]:
    """The goal of FP8 is one of the recipes': where one meets it, the others are not asked for it."""
    asked = [r for r in found if r["goal"] == FP8_GOAL]
    if any(r["met"] for r in asked):
        for r in asked:
            if not r["met"]:
                r["goal"] = r["met"] = None
    return found


def line(row: dict) -> str:
    if "error" in row:
        return f"  {row['tokens']:>6} tokens  {row['error']}"
    more = f"  MFU {row['mfu']:.1%} (layers {row['layers_mfu']:.1%})" if "mfu" in row else ""
    parts = ", ".join(f"{part} {row[f'{part}_seconds'] * 1e3:.1f}" for part in ("layers", "head", "optimizer"))
    return (f"  {row['tokens']:>6} tokens  {row['seconds'] * 1e3:>9.1f} ms: {parts}  {row['tokens_per_second']:>10,.0f} tokens/s  "
            f"{row['tflops']:.1f} TFLOP/s  peak {row['peak_bytes'] / 2**30:.2f} GiB{more}")  # fmt: skip


def main() -> None:
    arguments = parse()
    budget = common.budget_of(arguments)
    if arguments.tiny:
        arguments.tokens, arguments.steps = [128, 256], 1
    if arguments.jobs:
        return work_off(arguments, budget)
    given = ["--layers", str(arguments.layers), "--tokens", *map(str, arguments.tokens), "--micro-batches", str(arguments.micro_batches)]
    given += ["--steps", str(arguments.steps), *(["--tiny"] if arguments.tiny else []), *(["--recompute"] if arguments.recompute else [])]
    given += ["--profile", str(arguments.profile)] if arguments.profile else []
    rows, models = [], ["tiny"] if arguments.tiny else arguments.models
    todo = jobs(arguments)
    for model in dict.fromkeys(job["model"] for job in todo):  # a process each, whose memory goes with it
        rows += common.measure(__file__, [job for job in todo if job["model"] == model], given, budget)
    found = flat(rows)
    asked = [] if arguments.tiny else ratios(found, models, arguments.tokens)
    profiles = {f"{job['model']}, {job['precision']}": job["profile"] for job in rows if "profile" in job}
    common.finish("train_step", found, asked, arguments.json, profiles=profiles)
    return None


if __name__ == "__main__":
    main()

"""Throughput of our engine beside vLLM's own LLM.generate: the same prompts, seeds and engine settings, CUDA graphs on.

    python benchmarks/gpu/generation.py [MODEL_DIR] [--requests 512] [--prompt 64] [--answer 256] [--compile] [--json FILE] [--seconds N]
                                        [--tiny]

MODEL_DIR: a Hugging Face directory; without one, random weights of Qwen2.5-1.5B's shapes. Weights in BF16, and in FP8 by vLLM's own
quantisation. Each way has a process to itself: ours is rollout.Engine as in training, vLLM's an LLM as its documentation has it, its
engine in a process of its own. Nothing is compiled unless --compile is given, which takes a minute more: graphs of the decoding steps are
captured without, and a step is then a little slower on both sides.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch

from megatron_nft import policy, rollout
from megatron_nft.config import Config
from megatron_nft.rollout.settings import Request, sampling_params, set_environment

WAYS, GOAL = ("vLLM", "ours"), ">= 0.95"


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=150)
    parser.add_argument("model", nargs="?", type=common.model_directory)
    parser.add_argument("--requests", type=common.positive, default=512)
    parser.add_argument("--prompt", type=common.positive, default=64, help="tokens")
    parser.add_argument("--answer", type=common.positive, default=256, help="tokens at most")
    parser.add_argument("--repeats", type=common.positive, default=2)
    parser.add_argument("--compile", action="store_true", help="as vLLM is started in training")
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace, weights: str) -> Config:
    config = Config(run_dir="unused")
    config.model.path = str(arguments.model)
    config.rollout.max_num_seqs, config.rollout.cpu_kvcache_space = arguments.requests, 1
    config.rollout.quantization = "fp8" if weights == "fp8" else None
    config.rollout.enable_prefix_caching = False  # a repetition has to do the same work
    if torch.cuda.is_available() and not arguments.compile:
        config.rollout.vllm["compilation_config"] = common.GRAPHS_ALONE
    return config


def requests(vocab: int, arguments: argparse.Namespace, count: int, answer: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(tuple(rng.integers(0, vocab, arguments.prompt).tolist()), 1.0, 1.0, answer, 1000 + i) for i in range(count)]


def measure_job(job: dict, arguments: argparse.Namespace) -> dict:
    """One way, with weights in one precision."""
    from megatron_nft.weights import read_json

    config = settings_of(arguments, job["weights"])
    vocab = min(read_json(arguments.model / "config.json")["vocab_size"], 1000)  # ids that the tokenizer has, or nearly so
    started = time.perf_counter()
    generate, close = (ours if job["way"] == "ours" else vllms)(config, arguments.prompt + arguments.answer)
    start_seconds = time.perf_counter() - started
    generate(requests(vocab, arguments, min(arguments.requests, 32), 8))
    asked, rates = requests(vocab, arguments, arguments.requests, arguments.answer), []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        tokens = generate(asked)
        rates.append(tokens / (time.perf_counter() - started))
    close()
    print(f"{job['way']}, {job['weights']}: {max(rates):,.0f} tokens/s, start {start_seconds:.0f} s", flush=True)
    return {
        "tokens": tokens,
        "tokens_per_second": max(rates),
        "rates": rates,
        "start_seconds": start_seconds,
        "compiled": arguments.compile,
    }


def ours(config: Config, longest: int):
    """(generate(requests) -> tokens sampled, close)."""
    policy.start_distributed()
    engine = rollout.Engine(config.model.path, config.rollout, longest, policy.precision_of("auto"), config.seed)

    def close() -> None:
        engine.close()
        policy.shutdown()

    return lambda asked: sum(len(response.token_ids) for response in engine.generate(asked)), close


def vllms(config: Config, longest: int):
    """The same of vLLM by itself."""
    set_environment(config.rollout)
    if torch.cuda.is_available():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # its own default
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has asked torch for GPUs: a fork of it can use none
    from vllm import LLM

    llm = LLM(**rollout.engine_arguments(config.rollout, config.model.path, longest, policy.precision_of("auto"), config.seed))

    def generate(asked: list[Request]) -> int:
        prompts = [{"prompt_token_ids": list(request.token_ids)} for request in asked]
        outputs = llm.generate(prompts, [sampling_params(request) for request in asked], use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate, lambda: None


def ratios(rows: list[dict]) -> list[dict]:
    by = {(row["way"], row["weights"]): row for row in rows}
    return [
        common.ratio(
            f"generation, {weights} weights: our engine to vLLM's LLM.generate, tokens/s",
            common.quotient(by.get(("ours", weights)), by.get(("vLLM", weights)), "tokens_per_second"),
            GOAL,
        )
        for weights in dict.fromkeys(row["weights"] for row in rows)
    ] + [
        common.ratio(
            "generation, our engine: FP8 weights to BF16, tokens/s",
            common.quotient(by.get(("ours", "fp8")), by.get(("ours", "bf16")), "tokens_per_second"),
        )
    ]


def main() -> None:
    arguments = parse()
    budget = common.budget_of(arguments)
    if arguments.tiny:
        arguments.requests, arguments.prompt, arguments.answer, arguments.repeats = 8, 8, 8, 1
    if arguments.jobs:
        return common.work_off(arguments, lambda job: measure_job(job, arguments))
    with tempfile.TemporaryDirectory() as scratch:
        shape = common.shape("tiny" if arguments.tiny else "qwen2.5-1.5b")
        model = arguments.model or common.write_model(shape, Path(scratch) / "model")
        common.free()
        sizes = {name: getattr(arguments, name) for name in ("requests", "prompt", "answer", "repeats")}
        given = [str(model), *(part for name, value in sizes.items() for part in (f"--{name}", str(value)))]
        given += ["--compile"] if arguments.compile else []
        kinds = ("bf16", "fp8") if torch.cuda.is_available() else ("bf16",)
        todo = [{"way": way, "weights": weights} for weights in kinds for way in WAYS]
        rows = common.measure(__file__, todo, given, budget, apart=True)
    common.finish("generation", [row | sizes for row in rows], ratios(rows), arguments.json)
    return None


if __name__ == "__main__":
    main()

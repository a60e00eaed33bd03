"""Seconds, tokens/s, MFU and peak memory of one training step, and of the log-prob path beside the plain way and Liger.

    python benchmarks/gpu/train_step.py [--model qwen2.5-1.5b|qwen2.5-32b] [--layers N] [--tokens 4096 8192 16384] [--fp8 hybrid]
                                        [--json FILE] [--tiny]

Random weights of Qwen2.5's shapes (of 32B a slice of --layers layers, embedding and head whole), packed answers of uneven lengths, one
micro-batch a step, one GPU. Needs torch, Megatron-Core and this repository on PYTHONPATH; Transformer Engine and liger_kernel are used
where they can be imported. --tiny is a model of two layers: it shows that the script runs, on a CPU as well. MFU is by the usual count
(flops.py) against the device's dense peak in bf16, or in FP8 with --fp8.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from flops import peak, training_flops  # noqa: E402

from megatron_nft import batching, objectives, policy  # noqa: E402
from megatron_nft.config import Config  # noqa: E402
from megatron_nft.policy.logprobs import Head, fused_loss, logprobs  # noqa: E402

COMMON = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "max_position_embeddings": 32768}
MODELS = {
    "qwen2.5-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                     "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
                    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip


def main() -> None:
    arguments = parse()
    name = "tiny" if arguments.tiny else arguments.model
    hf = {**COMMON, **MODELS[name]}
    hf["num_hidden_layers"] = arguments.layers or hf["num_hidden_layers"]
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "CPU"
    results = {"device": device, "torch": torch.__version__, "model": name, "layers": hf["num_hidden_layers"], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf))
        config = configure(folder, arguments)
        topology = policy.initialize(config.parallel, config.seed)
        results["kernels"] = policy.kernels(config)
        print(f"{name}, {hf['num_hidden_layers']} layers, random weights; {results['kernels']}; torch {torch.__version__}")
        model = make(config, topology)
        for tokens in arguments.tokens:
            config.train.tokens_per_micro_batch = tokens
            row = measure_step(model, hf, tokens, arguments, device)
            results["rows"].append(row)
            print_row("train step", row)
        weight = policy_head(model)
        for tokens in arguments.tokens:
            for way, function in WAYS.items():
                row = measure_head(function, weight, tokens, hf["vocab_size"], arguments.steps) | {"way": way, "tokens": tokens}
                results["rows"].append(row)
                print_row(f"log-probs, {way}", row)
    policy.shutdown()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--fp8", choices=["hybrid", "e4m3"])
    parser.add_argument("--fp8-recipe", default="tensorwise")
    parser.add_argument("--recompute", action="store_true", help="recompute_granularity=full")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that are not")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def configure(folder: str, arguments: argparse.Namespace) -> Config:
    config = Config(run_dir="unused")
    config.model.path, config.model.fp8, config.model.fp8_recipe = folder, arguments.fp8, arguments.fp8_recipe
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
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.copy_(0.02 * torch.randn_like(parameter))
    model.optimizer.reload_model_params()
    return model


def packed(model: policy.Policy, tokens: int, vocab: int) -> tuple[list, list[int]]:
    """A mini-batch of one full micro-batch, and the lengths of its answers: random ids, a prompt of an eighth and an answer each."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < tokens:  # a tenth to a half of what there is
        lengths.append(min(int(rng.integers(tokens // 10, tokens // 2)), tokens - sum(lengths)))
    lengths = [length for length in lengths if length >= 16]
    answers = {}
    for number, length in enumerate(lengths):
        ids, prompt = rng.integers(0, vocab, length).tolist(), length // 8
        answers[number] = batching.TrainingAnswer(
            ids[:prompt], ids[prompt:], [-1.0] * (length - prompt), [1] * (length - prompt), float(number % 2)
        )
    prompts = np.array([len(a.prompt) for a in answers.values()])
    responses = np.array([len(a.response) for a in answers.values()])
    table = batching.Answers(
        prompts, responses, responses, np.arange(len(lengths)) % 2.0, np.zeros(len(lengths)), np.zeros(len(lengths), int)
    )
    plan = batching.plan(table, model.layout(1), lambda verdicts, _: np.ones(len(verdicts)), "token-mean", 1.0)
    [batches] = model.pack(plan, answers)
    return batches, lengths


def measure_step(model: policy.Policy, hf: dict, tokens: int, arguments: argparse.Namespace, device: str) -> dict:
    batches, lengths = packed(model, tokens, hf["vocab_size"])
    objective = partial(objectives.loss, settings=model.config.objective)
    model.fill_old_logprobs(batches, model.config.objective)
    seconds, memory = timed(lambda: model.update(batches, objective, objectives.METRICS), arguments.steps)
    row = {"tokens": tokens, "fp8": arguments.fp8, "seconds": seconds, "tokens_per_second": sum(lengths) / seconds, "peak_bytes": memory}
    if limit := peak(device, fp8=arguments.fp8 is not None):
        row["mfu"] = training_flops(hf, lengths) / seconds / limit
    return row


def policy_head(model: policy.Policy) -> torch.Tensor:
    from megatron_nft.policy.model import head_weight

    return head_weight(model.module).detach().clone()


def one_pass(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab: int) -> torch.Tensor:
    return fused_loss(hidden, Head(weight, vocab), targets, lambda values, *_: (values.sum(), {}))[0]


def recomputing(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab: int) -> torch.Tensor:
    return logprobs(hidden, Head(weight, vocab), targets)[0].sum()


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab: int) -> torch.Tensor:
    return (hidden @ weight[:vocab].T).float().log_softmax(-1).gather(1, targets[:, None]).sum()


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab: int) -> torch.Tensor:
    return -LigerLoss(reduction="sum")(weight[:vocab], hidden, targets)


WAYS = {"one pass": one_pass, "recomputing": recomputing, "plain": plain}
try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as LigerLoss

    if torch.cuda.is_available():  # its kernels are Triton's
        WAYS["Liger"] = liger
except ModuleNotFoundError:
    pass  # the table then has no such row


def measure_head(function, weight: torch.Tensor, tokens: int, vocab: int, steps: int) -> dict:
    """Forward and backward of the log-probs of `tokens` random hidden states."""
    g = torch.Generator(device=weight.device).manual_seed(0)
    hidden = torch.randn(tokens, weight.shape[1], device=weight.device, generator=g).to(weight.dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=weight.device, generator=g)
    weight = weight.requires_grad_()

    def work() -> None:
        hidden.grad = weight.grad = None
        function(hidden, weight, targets, vocab).backward()

    try:
        seconds, memory = timed(work, steps)
    except torch.OutOfMemoryError:
        return {"seconds": None, "peak_bytes": None}
    return {"seconds": seconds, "peak_bytes": memory}


def timed(work, steps: int) -> tuple[float, int]:
    """(median seconds of `steps` runs after two, most bytes in use)."""
    meter, took = policy.PeakMemory(), []
    for step in range(2 + steps):
        if step == 2:
            meter.start()
        torch.cuda.synchronize()  # a CPU has nothing to wait for (policy/cpu.py)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return statistics.median(took[2:]), meter.peak()


def print_row(what: str, row: dict) -> None:
    if row["seconds"] is None:
        print(f"{what:<20}{row['tokens']:>8} tokens   does not fit")
        return
    more = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    print(f"{what:<20}{row['tokens']:>8} tokens  {row['seconds'] * 1e3:>10.1f} ms  {row['tokens'] / row['seconds']:>12,.0f} tokens/s  "
          f"peak {row['peak_bytes'] / 2**30:.2f} GiB{more}")  # fmt: skip


if __name__ == "__main__":
    main()

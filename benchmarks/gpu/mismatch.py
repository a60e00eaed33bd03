"""How far the trainer's log-probs are from the engine's, by precision, and whether any is the same to the last bit.

    python benchmarks/gpu/mismatch.py [MODEL_DIR] [--tokens 100000] [--data FILE] [--engines NAME ...] [--json FILE] [--seconds N] [--tiny]

MODEL_DIR: a Hugging Face directory with its tokenizer (default: the arithmetic example's model); --data: questions (default: that
example's). At temperature 1 the engine samples --tokens tokens, and the trainer tells their log-probs. d is trainer less engine: mean and
largest |d|, k3 = mean of exp(d) - 1 - d, which estimates KL(engine, trainer), and the share of tokens with d = 0.
  engines   bf16 | fp16 | fp8 (weights quantised by vLLM, the trainer bf16) | invariant (bf16, VLLM_BATCH_INVARIANT=1); a process each
  logits    float32 on both sides, or rounded to the model's precision on both sides (not fp8)
  trainers  of the same precision; of bf16 also FP8 training, hybrid and tensorwise; of invariant also without Transformer Engine, whose
            place PyTorch's kernels take; "the engine's prefill" is the engine once more, given the whole answer at once: of the
            invariant engine it must be the same to the last bit
Under `invariant` cuBLAS, Transformer Engine and Megatron-Core are asked for deterministic kernels as well. vLLM then multiplies, norms and
attends with kernels of its own; the trainer's are others, so that its bits are the engine's only where both round alike. Cost: sampled
tokens a second beside bf16's. Nothing is compiled in the engines (generation.py says why).
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import common
import torch

from megatron_nft import objectives, policy, prompts, rollout
from megatron_nft.config import Config, DatasetConfig, ObjectiveConfig
from megatron_nft.policy import logprobs, versions
from megatron_nft.policy.settings import DTYPES
from megatron_nft.rollout.settings import Request

EXAMPLE = common.ROOT / "examples" / "arithmetic"
ENGINES = {"bf16": "bf16", "fp16": "fp16", "fp8": "bf16", "invariant": "bf16", "fp32": "fp32"}  # and the trainer's precision
PREFILL = "the engine's prefill"
CACHE = 8 * 2**30  # bytes: a share of the GPU would be millions of blocks with a small model, each an object of vLLM's
FP8, LOCAL = "fp8 (hybrid, tensorwise)", "bf16, local layers"
MORE = {"bf16": (FP8,), "invariant": (LOCAL,)}  # trainers beside the one of the same precision


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=220)
    parser.add_argument("model", nargs="?", type=common.model_directory, default=EXAMPLE / "model")
    parser.add_argument(
        "--data", type=common.existing_file, default=EXAMPLE / "prompts.jsonl", help="a data set; its column problem, or question"
    )
    parser.add_argument("--tokens", type=common.positive, default=100_000)
    parser.add_argument("--answer", type=common.positive, default=256, help="tokens at most")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=["bf16", "invariant", "fp8", "fp16"])
    return parser.parse_args()


def settings_of(job: dict, arguments: argparse.Namespace) -> Config:
    config = Config(run_dir="unused")
    config.model.path, config.model.precision = str(arguments.model), ENGINES[job["engine"]]
    config.data.train, config.data.max_prompt_length = [DatasetConfig(path=str(arguments.data))], 512
    config.train.tokens_per_micro_batch = 16384 if torch.cuda.is_available() else 2048
    own = config.rollout
    own.max_tokens, own.max_num_seqs, own.gpu_memory_utilization, own.cpu_kvcache_space = arguments.answer, 256, 0.4, 1
    own.quantization = "fp8" if job["engine"] == "fp8" else None
    if torch.cuda.is_available():
        own.vllm |= {"compilation_config": common.GRAPHS_ALONE, "kv_cache_memory_bytes": CACHE}
    if job["engine"] == "invariant":
        config.megatron.transformer["deterministic_mode"] = True
    return config


def ask_for_the_same_bits() -> None:
    """Before torch's CUDA side, Transformer Engine and vLLM are started, which read these once."""
    os.environ.update(VLLM_BATCH_INVARIANT="1", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=":16:8", CUBLASLT_WORKSPACE_SIZE="1")  # as vLLM sets them, too late for the trainer


def measure_job(job: dict, arguments: argparse.Namespace, budget: common.Budget) -> dict:
    """Rows of one engine: {"rows": [...]}."""
    if job["engine"] == "invariant":
        ask_for_the_same_bits()
    config = settings_of(job, arguments)
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology, trainable=False)
    questions = prompts.load_prompts(config.data.train, prompts.load_tokenizer(config.model.path), config.data).prompts
    longest = max(len(prompt.token_ids) for prompt in questions) + arguments.answer + 1  # one to spare, for its prefill
    engine = rollout.Engine(config.model.path, config.rollout, longest, config.model.precision, config.seed)
    rows, samples = [], {}
    for logits in ("float32",) if job["engine"] == "fp8" else ("float32", "rounded"):
        set_head(engine, DTYPES[config.model.precision] if logits == "rounded" else torch.float32)
        samples[logits], speed = sample(engine, questions, arguments)
        of = {"engine": job["engine"], "logits": logits, "sampled_per_second": speed}
        rows.append(of | {"trainer": config.model.precision} | compare(model, samples[logits], logits == "rounded"))
        rows.append(of | {"trainer": PREFILL} | against_prefill(engine, samples[logits]))
    del model
    for name in MORE.get(job["engine"], ()) if torch.cuda.is_available() else ():
        if budget.left:
            common.free()
            rows.append(rows[0] | {"trainer": name} | compare(another(name, config, topology), samples["float32"], rounded=False))
    engine.close()
    policy.shutdown()
    for row in rows:
        print(line(row), flush=True)
    return {"rows": rows}


def another(name: str, config: Config, topology: policy.Topology) -> policy.Policy:
    """A second trainer of the same weights."""
    config.model.fp8 = "hybrid" if name == FP8 else None
    here = versions.have_transformer_engine()
    with mock.patch.object(versions, "have_transformer_engine", lambda: here and name != LOCAL):
        return policy.Policy(config, topology, trainable=False)


def set_head(engine: rollout.Engine, dtype: torch.dtype) -> None:
    """Have the engine's logits made in a dtype from here on: its head is no part of what graphs have captured."""

    def change(model: torch.nn.Module) -> None:
        model.logits_processor.head_dtype = dtype

    engine._llm.apply_model(change)


def sample(engine: rollout.Engine, questions: list, arguments: argparse.Namespace) -> tuple[list, float]:
    """[(token ids of prompt, response)] of at least so many sampled tokens, and how many were sampled a second."""
    found, tokens, seconds, seed = [], 0, 0.0, 0
    while tokens < arguments.tokens:
        count = max((arguments.tokens - tokens) // arguments.answer + 1, 1)
        asked = [questions[(seed + i) % len(questions)].token_ids for i in range(count)]
        requests = [Request(ids, 1.0, 1.0, arguments.answer, 7919 + seed + i) for i, ids in enumerate(asked)]
        started = time.perf_counter()
        responses = engine.generate(requests)
        seconds += time.perf_counter() - started
        found += zip(map(list, asked), responses, strict=True)
        tokens += sum(len(response.token_ids) for response in responses)
        seed += count
    return found, tokens / seconds


def compare(model: policy.Policy, samples: list, rounded: bool) -> dict:
    """The trainer against the engine."""
    sequences = [ids + response.token_ids for ids, response in samples]
    started = time.perf_counter()
    with rounded_logits(DTYPES[model.config.model.precision]) if rounded else nullcontext():
        told = policy.token_logprobs(model, sequences)
    seconds = time.perf_counter() - started
    return distance(told, samples) | {"trainer_per_second": sum(map(len, sequences)) / seconds}


def against_prefill(engine: rollout.Engine, samples: list) -> dict:
    """The engine, given whole answers, against itself as it sampled them."""
    return distance(engine.token_logprobs([ids + response.token_ids for ids, response in samples]), samples)


@contextmanager
def rounded_logits(dtype: torch.dtype) -> Iterator[None]:
    """Have the trainer round its logits, which it never does, as an engine without a float32 head does."""
    plain = logprobs._Chunks.logits

    def rounded(self, part: slice) -> torch.Tensor:
        logits = plain(self, part)
        return logits.copy_(logits.to(dtype))

    with mock.patch.object(logprobs._Chunks, "logits", rounded):
        yield


def distance(told: list[list[float]], samples: list) -> dict:
    """told: of each sequence's tokens but the first."""
    ours = torch.tensor([p for row, (ids, _) in zip(told, samples, strict=True) for p in row[len(ids) - 1 :]], dtype=torch.float64)
    theirs = torch.tensor([p for _, response in samples for p in response.logprobs], dtype=torch.float64)
    _, sums = objectives.correction(ours, theirs, torch.ones_like(ours), torch.zeros(len(ours), dtype=torch.int64), ObjectiveConfig())
    return {
        "tokens": len(ours),
        "mean_absolute": float(sums["mismatch_absolute"]) / len(ours),
        "largest": float((ours - theirs).abs().max()),
        "k3": float(sums["mismatch_k3"]) / len(ours),
        "bit_equal": float((ours == theirs).double().mean()),
    }


def line(row: dict) -> str:
    return (f"engine {row['engine']:<10} logits {row['logits']:<9} {row['trainer']:<22} {row['tokens']:>8,} tokens  mean |d| "
            f"{row['mean_absolute']:.3g}  largest {row['largest']:.3g}  k3 {row['k3']:.3g}  equal {row['bit_equal']:.2%}")  # fmt: skip


def ratios(rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        if "error" in row:
            continue
        of = f"engine {row['engine']}, logits {row['logits']}, {row['trainer']}"
        found += [common.ratio(f"{of}: mean |d|", row["mean_absolute"]), common.ratio(f"{of}: k3", row["k3"])]
    by = {(row["engine"], row.get("logits"), row.get("trainer")): row for row in rows}
    invariant, plain = (by.get((engine, "float32", "bf16")) for engine in ("invariant", "bf16"))
    for trainer, name in (("bf16", "the trainer's"), (LOCAL, "the trainer's without Transformer Engine"), (PREFILL, "its own prefill's")):
        for logits in ("float32", "rounded") if trainer != LOCAL else ("float32",):
            share = (by.get(("invariant", logits, trainer)) or {}).get("bit_equal")
            goal = ">= 1" if logits == "float32" and trainer != LOCAL else None
            found.append(common.ratio(f"batch-invariant engine, logits {logits}: share of tokens bit-equal to {name}", share, goal))
    cost = common.quotient(invariant, plain, "sampled_per_second")
    found.append(common.ratio("batch-invariant engine: sampled tokens/s to plain bf16's", cost))
    return found


def main() -> None:
    arguments = parse()
    budget = common.budget_of(arguments)
    if arguments.tiny:
        arguments.tokens, arguments.answer, arguments.engines = 200, 16, ["fp32"]
    if arguments.jobs:
        return common.work_off(arguments, lambda job: measure_job(job, arguments, budget))
    given = [str(arguments.model), "--data", str(arguments.data), "--tokens", str(arguments.tokens), "--answer", str(arguments.answer)]
    made = common.measure(__file__, [{"engine": name} for name in arguments.engines], given, budget, apart=True)
    rows = [row for job in made for row in job.get("rows", [job])]
    common.finish("mismatch", rows, ratios(rows), arguments.json)
    return None


if __name__ == "__main__":
    main()

"""The planner's time model against published runs, each on its own workload, by the functions that `megatron-nft plan` uses.

    python benchmarks/planner_rows.py            the table of docs/planner.md
    python benchmarks/planner_rows.py --json     the same as JSON

One set of constants for all rows. `used` marks the rows by which a constant was set; the others were only compared.
"""

import argparse
import bisect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from megatron_nft.config import Config
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.generation import Order, simulate
from megatron_nft.planner.memory import memory
from megatron_nft.planner.times import Times, times
from megatron_nft.planner.training_time import Training
from megatron_nft.planner.workload import Workload


def hf(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, **more: object) -> dict:
    """The numbers of a config.json."""
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return dict(zip(keys, (layers, hidden, ffn, heads, groups, vocabulary))) | {"tie_word_embeddings": False, "model_type": "llama"} | more


LLAMA3_8B, LLAMA3_70B = hf(32, 4096, 14336, 32, 8, 128256), hf(80, 8192, 28672, 64, 8, 128256)
LLAMA3_405B, LLAMA2_70B = hf(126, 16384, 53248, 128, 8, 128256), hf(80, 8192, 28672, 64, 8, 32000)
LLAMA2_7B, LLAMA2_13B = hf(32, 4096, 11008, 32, 32, 32000), hf(40, 5120, 13824, 40, 40, 32000)
QWEN3_32B = hf(64, 5120, 25600, 64, 8, 151936, head_dim=128, model_type="qwen3")
QWEN25_32B = hf(64, 5120, 27648, 40, 8, 152064, model_type="qwen2")
# Without a gate: an MLP of 4 x hidden in two matrices has the weights of one of 8/3 x hidden in three
NEMOTRON_15B, NEMOTRON_340B = hf(32, 6144, 16384, 48, 8, 256000), hf(96, 18432, 49152, 96, 8, 256000)
GPT_175B, GPT_530B = hf(96, 12288, 32768, 96, 96, 51200), hf(105, 20480, 54613, 128, 128, 51200)

BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md, container 26.02"
BRIDGE_2511 = "github.com/NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md, container 25.11"
NEMO = "github.com/NVIDIA/NeMo docs/source/performance/performance_summary.md, container 24.07"
DGXC = "github.com/NVIDIA/dgxc-benchmarking (catalog.ngc.nvidia.com, dgxc-benchmarking), container 24.09 and 24.11"
KORTHIKANTI = "arXiv 2205.05198, table 5"
NEMO_RL = "github.com/NVIDIA-NeMo/RL docs/about/performance-summary.md, v0.4, and its recipes"
DECODE = "Llama 3.3 70B by vLLM on 4 H100, 138 tokens in and 900 out: a public notebook, MFU in inference, 2025"
VERL = "github.com/verl-project/verl issue 795: 230 steps in 5 days on 128 A800"


@dataclass(frozen=True)
class Row:
    """A published run and what the model says of it."""

    name: str
    source: str
    published: float
    unit: str
    predict: Callable[[], float] = field(repr=False)
    used: str = ""  # which constant was set by it
    loose: str = ""  # why it is told and not tested


def training_config(
    gpus: int, cut: tuple[int, int, int, int], length: int, batch: int, fp8: bool, gpu: str = "H100", micro: int = 1
) -> Config:
    """A pre-training run as one rollout step of one update: `batch` sequences of `length` tokens; cut: TP, PP, CP, chunks a stage."""
    config, (tp, pp, cp, vp) = Config(run_dir="runs/row"), cut
    config.model.path = "."
    parallel = config.parallel
    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size = tp, pp, cp
    parallel.virtual_pipeline_model_parallel_size, parallel.sequence_parallel = (vp if vp > 1 else None), tp > 1
    parallel.overlap_grad_reduce = parallel.overlap_param_gather = True
    config.model.fp8 = "hybrid" if fp8 else None
    config.plan.gpu, config.plan.nodes, config.plan.gpus_per_node = gpu, max(gpus // 8, 1), min(gpus, 8)
    config.plan.mean_response_length, config.plan.response_length_sigma, config.plan.mean_prompt_length = length, 0.0, 0
    config.rollout.prompts_per_step = config.train.prompts_per_update = batch
    config.rollout.n, config.rollout.dynamic_sampling, config.rollout.max_tokens = 1, False, length
    config.train.tokens_per_micro_batch = length * micro
    return config


def update(model: dict, gpus: int, cut: tuple[int, int, int, int], length: int, batch: int, fp8: bool = False, **more: object) -> float:
    """Seconds of an update; NVIDIA's recipes overlap tensor-parallel communication."""
    recompute, overlap = more.pop("recompute", None), more.pop("overlap", True)
    config = training_config(gpus, cut, length, batch, fp8, **more)
    config.train.recompute_granularity = recompute
    if overlap:
        config.megatron.transformer["tp_comm_overlap"] = True
    training = Training(config, model, Cluster.of(config))
    return training.update(training.shape(Workload.of(config))).total


def tokens_per_gpu(model: dict, gpus: int, cut: tuple[int, int, int, int], length: int, batch: int, **more: object) -> float:
    """Tokens a second and GPU of such an update."""
    return batch * length / gpus / update(model, gpus, cut, length, batch, True, **more)


def grpo_config(nodes: int, train: tuple[int, int], generate: int, response: float, prompt: int) -> Config:
    """NeMo-RL's recipes: 64 prompts x 32 answers, four updates, 4,096 tokens, all groups; train: TP, PP."""
    config = Config(run_dir="runs/row")
    config.model.path = "."
    config.plan.nodes, config.plan.mean_prompt_length = nodes, prompt
    rollout, parallel = config.rollout, config.parallel
    rollout.prompts_per_step, rollout.n, rollout.dynamic_sampling, rollout.max_tokens = 64, 32, False, 4096 - prompt
    rollout.tensor_parallel_size, rollout.max_num_seqs, rollout.order = generate, 256, "finished"
    config.plan.mean_response_length = before_cut(response, rollout.max_tokens, config.plan.response_length_sigma)
    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size = train
    parallel.sequence_parallel = train[0] > 1
    config.train.prompts_per_update, config.train.tokens_per_micro_batch = 16, 4096
    return config


def before_cut(mean: float, cap: int, sigma: float) -> int:
    """The mean of a log-normal length whose mean after the cut is given."""
    return bisect.bisect_left(range(50 * cap), mean, lo=1, key=lambda m: Workload(1, 1, 0, m, sigma, cap, 1.0, 1).mean_length)


def one_step_off(nodes: int, servers: int, train: tuple[int, int], generate: int, response: float, prompt: int, share: float) -> Config:
    """The same with servers that write the next step's answers."""
    config = grpo_config(nodes, train, generate, response, prompt)
    config.rollout.mode, config.rollout.served.count, config.rollout.max_staleness = "served", servers, 1
    config.rollout.gpu_memory_utilization = share
    return config


def grpo(model: dict, config: Config) -> float:
    """Seconds of a step. NeMo-RL does more than this program: a reference policy's log-probs (another forward pass, over all mini-batches),
    and old log-probs of the first mini-batch, too. Its engines are not kept in step."""
    cluster = Cluster.of(config)
    held = memory(config, model, cluster)
    own = times(config, model, cluster, held)
    updates = own.facts["updates"]
    extra = own.phases["old_logprobs"] * (2 * updates / (updates - 1) - 1)
    engine = replace(Engine.of(config, model, cluster, held.kv_tokens), lockstep=0)
    generating = simulate(Workload.of(config), Order.of(config), engine, cluster.engines).seconds
    if config.rollout.mode == "served":
        return max(generating, _training(own) + extra) + _rest(own)
    return own.step - own.phases["generate"] + generating + extra


def _training(own: Times) -> float:
    return own.phases["old_logprobs"] + own.phases["train"] + own.phases["rewards"]


def _rest(own: Times) -> float:
    return own.phases["sync"] + own.phases["other"]


def dapo() -> float:
    """Seconds of a DAPO step of this program on A100s, TP 8 in place of verl's sequence parallel 8; answers of 3,000 tokens on average."""
    config = training_config(128, (8, 1, 1, 1), 22528, 512, False, "A100")
    config.plan.mean_response_length, config.plan.response_length_sigma, config.plan.mean_prompt_length = 3000, 0.8, 150
    rollout, train = config.rollout, config.train
    rollout.prompts_per_step, rollout.n, rollout.dynamic_sampling, rollout.max_tokens = 512, 16, True, 20480
    rollout.tensor_parallel_size, rollout.gpu_memory_utilization, rollout.max_num_seqs = 4, 0.8, 256
    train.prompts_per_update, train.recompute_granularity = 32, "full"
    cluster = Cluster.of(config)
    return times(config, QWEN25_32B, cluster, memory(config, QWEN25_32B, cluster)).step


def decode(running: int) -> float:
    """Milliseconds of a token of each answer, over the 900 that are written behind a prompt of 138."""
    config = Config(run_dir="runs/row")
    config.plan.nodes, config.plan.gpus_per_node, config.rollout.tensor_parallel_size = 1, 4, 4
    engine = replace(Engine.of(config, LLAMA3_70B, Cluster.of(config), 10**6), lockstep=0)
    return 1e3 * float(engine.seconds(running, running * (138 + 450)))


def rows() -> list[Row]:
    """All of them."""
    second, rate, milli = "s an update", "tokens/s/GPU", "ms a token"
    l70, l405 = (4, 4, 2, 5), (8, 8, 2, 8)
    return [
        Row("Llama 3.1 70B, BF16, 64 H100, TP4 PP4 CP2 VP5", DGXC, 14.72, second,
            lambda: update(LLAMA3_70B, 64, l70, 8192, 128), used="H100 matrix products, BF16"),
        Row("Llama 3.1 70B, BF16, 2,048 H100, the same cut", DGXC, 14.98, second, lambda: update(LLAMA3_70B, 2048, l70, 8192, 4096)),
        Row("Nemotron-4 340B, BF16, 128 H100, TP8 PP8 VP12", DGXC, 4.61, second,
            lambda: update(NEMOTRON_340B, 128, (8, 8, 1, 12), 4096, 32)),
        Row("Nemotron-4 15B, BF16, 16 H100, TP4, 4 sequences", DGXC, 2.83, second,
            lambda: update(NEMOTRON_15B, 16, (4, 1, 1, 1), 4096, 64, micro=4)),
        Row("Llama 3 70B, FP8, 64 H100, TP4 PP8 VP5", BRIDGE, 1621, rate, lambda: tokens_per_gpu(LLAMA3_70B, 64, (4, 8, 1, 5), 8192, 256),
            used="H100 matrix products, FP8"),
        Row("Llama 3.1 405B, FP8, 1,024 H100, TP8 PP8 CP2 VP8", BRIDGE, 311, rate,
            lambda: tokens_per_gpu(LLAMA3_405B, 1024, l405, 8192, 1536)),
        Row("Llama 3 70B, FP8, 64 H100, TP4 PP4 CP2 VP5", NEMO, 1533, rate, lambda: tokens_per_gpu(LLAMA3_70B, 64, l70, 8192, 128)),
        Row("Llama 2 70B, FP8, 64 H100, TP4 PP4 VP20", NEMO, 1707, rate, lambda: tokens_per_gpu(LLAMA2_70B, 64, (4, 4, 1, 20), 4096, 128)),
        Row("Llama 2 13B, FP8, 16 H100, PP4 VP10", NEMO, 8646, rate, lambda: tokens_per_gpu(LLAMA2_13B, 16, (1, 4, 1, 10), 4096, 128)),
        Row("Llama 2 7B, FP8, 8 H100", NEMO, 16847, rate, lambda: tokens_per_gpu(LLAMA2_7B, 8, (1, 1, 1, 1), 4096, 128)),
        Row("Llama 3.1 405B, FP8, 128 B200, TP4 PP8 CP2 VP8", BRIDGE_2511, 661, rate,
            lambda: tokens_per_gpu(LLAMA3_405B, 128, (4, 8, 2, 8), 8192, 64, gpu="B200")),
        Row("Llama 3 8B, FP8, 8 B200, 2 sequences", BRIDGE_2511, 30624, rate,
            lambda: tokens_per_gpu(LLAMA3_8B, 8, (1, 1, 1, 1), 8192, 128, gpu="B200", micro=2)),
        Row("GPT 175B, 16 bits, 64 A100, TP8 PP8 VP3, selective", KORTHIKANTI, 13.75, second, lambda: korthikanti(GPT_175B, 64, 8, 64),
            used="A100 matrix products"),
        Row("GPT 530B, 16 bits, 280 A100, TP8 PP35 VP3, selective", KORTHIKANTI, 37.83, second,
            lambda: korthikanti(GPT_530B, 280, 35, 280)),
        Row("Llama 3.3 70B decoding, 1 answer, 4 H100", DECODE, 17.81, milli, lambda: decode(1), used="small kernels of a decoding layer"),
        Row("Llama 3.3 70B decoding, 32 answers, 4 H100", DECODE, 22.80, milli, lambda: decode(32)),
        Row("GRPO, Llama 3.1 8B, 16 H100", NEMO_RL, 97.7, "s a step",
            lambda: grpo(LLAMA3_8B, recomputing(grpo_config(2, (1, 2), 1, 1060, 130)))),
        Row("GRPO, Qwen3 32B, 32 H100", NEMO_RL, 393, "s a step", lambda: grpo(QWEN3_32B, grpo_config(4, (4, 4), 4, 3206, 110))),
        Row("GRPO one step off, Qwen3 32B, 32 + 32 H100", NEMO_RL, 215, "s a step",
            lambda: grpo(QWEN3_32B, one_step_off(8, 8, (4, 4), 4, 3207, 110, 0.8))),
        Row("DAPO, Qwen2.5 32B, 128 A800", VERL, 1878, "s a step", dapo, loose="another program; its answers' lengths are assumed"),
    ]  # fmt: skip


def korthikanti(model: dict, gpus: int, stages: int, batch: int) -> float:
    """Their runs: one replica, no overlap, attention recomputed."""
    return update(model, gpus, (8, stages, 1, 3), 2048, batch, gpu="A100", recompute="selective", overlap=False)


def recomputing(config: Config) -> Config:
    """activation_checkpointing: true."""
    config.train.recompute_granularity = "full"
    return config


def table(found: list[dict]) -> str:
    """Markdown."""
    lines = ["| run | published | model | model / published | |", "|---|---|---|---|---|"]
    for row in found:
        note = f"sets: {row['used']}" if row["used"] else row["loose"]
        lines.append(f"| {row['name']} | {row['published']:,g} {row['unit']} | {row['model']:,.4g} | {row['ratio']:.2f} | {note} |")
    return "\n".join(lines)


def compare() -> list[dict]:
    """Every row with what the model says."""
    found = []
    for row in rows():
        model = row.predict()
        told = {key: value for key, value in asdict(replace(row, predict=float)).items() if key != "predict"}
        found.append(told | {"model": model, "ratio": model / row.published})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    found = compare()
    if parser.parse_args().json:
        print(json.dumps(found, indent=1))
        return
    print(table(found))
    print("\nEstimates, all of them. Sources:")
    for source in dict.fromkeys(row["source"] for row in found):
        print(f"  {source}")


if __name__ == "__main__":
    main()

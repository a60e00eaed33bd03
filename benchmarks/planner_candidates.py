"""Ways to run the 32B preset on 128 H100, side by side: the table of docs/planner.md.

python benchmarks/planner_candidates.py          Markdown
python benchmarks/planner_candidates.py --json
"""

import argparse
import json
import tempfile
from pathlib import Path

from megatron_nft.config import load
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.memory import Memory, memory
from megatron_nft.planner.times import Times, times

# Qwen/Qwen2.5-32B, config.json
HF = {
    "model_type": "qwen2", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
COMMON = ["plan.nodes=16", "evaluation.interval=20"]
TP4_CP2_PP2 = [
    "parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
]  # fmt: skip
# without recomputation the activations of four micro-batches do not fit
TP4_PP4 = ["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=4", "train.recompute_granularity=full"]
PLAIN = ["rollout.gpu_memory_utilization=0.6", "train.offload=gradients", "parallel.overlap_param_gather=false"]
AHEAD = ["rollout.order=started", "rollout.max_staleness=1", "objective.correction.method=truncate"]
WEIGHTS = ["rollout.quantization=fp8", "objective.correction.method=truncate"]
BOTH = ["preset=[evaluation-32b,nft-32b,fp8-rollout]"]


def engine(tensor: int, slots: int) -> list[str]:
    """vLLM's sizes."""
    return [f"rollout.tensor_parallel_size={tensor}", f"rollout.max_num_seqs={slots}"]


def servers(count: int) -> list[str]:
    """Servers of four GPUs each."""
    return ["rollout.mode=served", f"rollout.served.count={count}", "rollout.gpu_memory_utilization=0.9", *AHEAD]


CANDIDATES = {
    "plain: TP8 DP16, vLLM TP4, share 0.6": [*PLAIN, *engine(4, 128)],
    "TP8 DP16, vLLM TP4 (preset nft-32b)": [],
    "TP4 CP2 PP2 VPP2 DP8, vLLM TP4": TP4_CP2_PP2,
    "TP4 PP4 DP8, vLLM TP4": TP4_PP4,
    "TP8 DP16, vLLM TP2": engine(2, 64),
    "TP8 DP16, vLLM TP4, FP8 weights": [*WEIGHTS, *engine(4, 240)],
    "TP8 DP16, vLLM TP4, FP8 (examples/qwen2.5_32b/nft.yaml)": BOTH,
    "the same, share 0.85": [*BOTH, "rollout.gpu_memory_utilization=0.85", *engine(4, 416)],
    "the same, vLLM TP2": [*BOTH, *engine(2, 144)],
    "TP4 CP2 PP2 VPP2 DP8, vLLM TP4, FP8": [*BOTH, *TP4_CP2_PP2],
    "TP8 DP16, vLLM TP4, an update ahead": AHEAD,
    "TP8 DP16, vLLM TP4, FP8, an update ahead": [*BOTH, *AHEAD],
    "the same, groups of 8 alike given up": [*BOTH, *AHEAD, "rollout.hopeless_after=8"],
    "16 servers TP4, 64 train": servers(16),
    "16 servers TP4, FP8, 64 train (nft_served.yaml)": [*BOTH, *servers(16)],
    "20 servers TP4, FP8, 48 train": [*BOTH, *servers(20)],
}


def reckon(overrides: list[str]) -> tuple[Memory, Times]:
    """Memory and times of the preset with these settings."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "preset.yaml"
        path.write_text("preset: [evaluation-32b, nft-32b]\nrun_dir: runs/plan\nmodel: {path: .}\n")
        config = load(path, [*COMMON, *overrides])
    cluster = Cluster.of(config)
    held = memory(config, HF, cluster)
    return held, times(config, HF, cluster, held)


def row(name: str, held: Memory, found: Times) -> dict:
    """What the table prints of a candidate."""
    fullest = max(sum(parts.values()) for parts in [*held.phases.values(), held.servers])
    phases, facts = found.phases, found.facts
    return {"candidate": name, "fits": held.fits, "fullest GPU, GiB": round(fullest / 2**30, 1), "s a step": round(found.step),
            "generate": round(phases["generate"]), "old log-probs": round(phases["old_logprobs"]), "train": round(phases["train"]),
            "sync": round(phases["sync"], 1), "other": round(phases["other"] + phases["save"] + phases["rewards"], 1),
            "bubble, s": round(found.parts["train"].get("bubble", 0.0), 1),
            "exposed communication, s": round(facts["seconds of exposed communication"], 1),
            "MFU": round(facts["model flops utilization"], 2), "tokens/s/GPU": round(found.tokens_per_gpu),
            "days": round(found.days, 2)}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    words = [["yes" if value is True else "no" if value is False else str(value) for value in row.values()] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    rows = [row(name, *reckon(overrides)) for name, overrides in CANDIDATES.items()]
    print(json.dumps(rows, indent=1) if parser.parse_args().json else table(rows))


if __name__ == "__main__":
    main()

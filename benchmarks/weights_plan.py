"""An estimate of a weight sync that was not run: byte counts of the stream's own plan, over assumed bandwidths."""

import torch

from megatron_nft.weights import Table, table_for
from megatron_nft.weights.stream import Load, Ranks, Shard, plan

QWEN_32B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}  # fmt: skip
TP, PP = 8, 2
# bytes/s. Peaks of an H100 SXM: NVLink 450e9 each way, InfiniBand 400 Gb/s for each GPU, HBM3 3.35e12; of which NCCL and copies get about
NVLINK, INFINIBAND, HBM = 0.8 * 450e9, 0.85 * 50e9, 0.8 * 3.35e12
LAUNCH = 6e-6  # seconds of a small copy: torch's overhead and the kernel's start
COLLECTIVE = 50e-6  # seconds of starting a broadcast or a gather
ENGINE_TENSOR = 300e-6  # seconds of Python in vLLM's reload for each tensor
WRITES = 2  # vLLM loads into new memory, then copies that to where its kernels look


def stages_of(table: Table, tp: int, pp: int) -> list[list[Shard]]:
    """What a rank of each pipeline stage holds, in bf16, layers dealt evenly."""
    stages: list[list[Shard]] = [[] for _ in range(pp)]
    for name in table.megatron_names():
        parts = name.split(".")
        last = name.startswith(("decoder.final", "output_layer"))
        stage = int(parts[2]) * pp // table.sizes.layers if parts[1] == "layers" else (pp - 1) * last
        stages[stage].append(Shard(name, table.shard_shape(name, tp), torch.bfloat16))
    return stages


def copies(load: Load, table: Table) -> int:
    """Copies from what was gathered to the bucket."""
    cut = [table.shard_shape(shard.name, 1) != shard.shape for shard in load.shards]
    return sum(len(table.hf_shapes_of(shard.name)) * (load.ranks.size if own else 1) for shard, own in zip(load.shards, cut))


def estimate(hf: dict, tp: int, pp: int, bucket_bytes: int) -> dict[str, float]:
    """Seconds by stage of one rank, engines of the same tensor-parallel size; the stages are not overlapped."""
    table = table_for(hf)
    loads = list(plan(stages_of(table, tp, pp), table, Ranks(tp), Ranks(), bucket_bytes))
    sent, whole = sum(load.sent for load in loads), sum(load.nbytes for load in loads)
    return {
        "bytes of the model": whole,
        "buckets": len(loads),
        "broadcast between pipeline stages": (sent / INFINIBAND + len(loads) * COLLECTIVE) * (pp > 1),
        "gather over TP": (whole * (tp - 1) / tp / NVLINK + len(loads) * COLLECTIVE) * (tp > 1),
        "copies": 2 * (sent / pp + whole) / HBM + LAUNCH * sum(len(load.shards) / pp + copies(load, table) for load in loads),
        "vLLM's load": 2 * WRITES * whole / tp / HBM + ENGINE_TENSOR * len(table.hf_shapes()),
    }


def show(bucket_mib: int) -> None:
    """Print the estimate for Qwen2.5-32B."""
    found = estimate(QWEN_32B, TP, PP, bucket_mib * 2**20)
    print(f"ESTIMATE, not measured: Qwen2.5-32B in bf16, TP {TP} x PP {PP}, one stage a node, vLLM TP {TP}, buckets of {bucket_mib} MiB")
    print(f"{found.pop('bytes of the model') / 1e9:.1f} GB in {found.pop('buckets'):.0f} buckets; assumed: NVLink {NVLINK / 1e9:.0f} GB/s, "
          f"InfiniBand {INFINIBAND / 1e9:.1f} GB/s, HBM {HBM / 1e12:.2f} TB/s, {1e6 * LAUNCH:.0f} us a copy, "
          f"{1e6 * COLLECTIVE:.0f} us a collective, {1e6 * ENGINE_TENSOR:.0f} us a tensor in vLLM")  # fmt: skip
    for stage, spent in found.items():
        print(f"  {stage:<36}{spent:>7.3f} s")
    print(f"  {'sum':<36}{sum(found.values()):>7.3f} s   planned: at most 1.0 s")

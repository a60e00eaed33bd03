"""Simple stand-ins for the planner's memory and time models, with the same trade-offs as the real ones: what stands on top of them is
tested against numbers that a reader can work out."""

from megatron_nft.config import max_model_len
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.memory import Memory, slot_multiple
from megatron_nft.planner.parameters import total as parameter_count
from megatron_nft.planner.times import Times

GIB = 2**30
RECOMPUTE = {None: (1.0, 1.0), "selective": (0.6, 1.05), "full": (0.1, 1.33)}  # activations, time
OFFLOAD = {
    "gradients": (0.0, 1.0, 1.0),
    None: (0.0, 1.0, 1.0),
    "none": (1.0, 1.0, 1.0),
    "optimizer": (0.0, 0.0, 1.0),
    "all": (0.0, 0.0, 0.0),
}


def memory(config, hf, cluster) -> Memory:
    """Sixteen bytes a parameter, activations by the micro-batch, and vLLM's share."""
    own, limit = Layout.of(config, cluster), cluster.gpu.memory - 4 * GIB
    rollout, tokens = config.rollout, config.train.tokens_per_micro_batch
    cut = parameter_count(hf) // (own.tp * own.pp)
    state = {"weights": 2 * cut, "gradients": 4 * cut, "optimizer": 12 * cut // (own.dp * own.cp)}
    kept = OFFLOAD[config.train.offload]
    staying = {name: int(nbytes * share) for (name, nbytes), share in zip(state.items(), (kept[2], kept[0], kept[1]))}
    per_token = 34 * 2 * hf["hidden_size"] * hf["num_hidden_layers"] * RECOMPUTE[config.train.recompute_granularity][0]
    activations = int(per_token * tokens / (own.tp * own.cp))
    engine = int(rollout.gpu_memory_utilization * cluster.gpu.memory)
    weights = 2 * parameter_count(hf) // rollout.tensor_parallel_size
    head = hf["hidden_size"] // hf["num_attention_heads"]
    kv = 4 * hf["num_hidden_layers"] * hf["num_key_value_heads"] * head // rollout.tensor_parallel_size
    phases = {
        "generate": staying | {"vLLM weights": weights, "KV cache": max(engine - weights, 0)},
        "old_logprobs": {"weights": state["weights"], "log-prob chunks": activations // 8},
        "train": state | {"activations": activations},
        "sync": staying | {"weights": state["weights"], "vLLM weights": weights, "buckets": 2**29},
        "save": state,
    }
    kv_tokens = max(engine - weights, 0) // kv
    room = limit - sum(state.values())
    unit = slot_multiple(own.tp, own.cp)
    micro = max(int(room * own.tp * own.cp / per_token), 0) // unit * unit
    longest = max(min(kv_tokens, micro) - config.data.max_prompt_length, 0)
    return Memory(phases, {}, {"pinned": 2**30}, limit, kv_tokens, micro, longest, max_model_len(config))


def times(config, hf, cluster, held) -> Times:
    """Tensor parallelism and context parallelism cost communication, pipelines a bubble, engines of many GPUs are faster by less."""
    own = Layout.of(config, cluster)
    products = 24000 / (own.tp * own.pp * own.cp * own.dp) * RECOMPUTE[config.train.recompute_granularity][1]
    micro = max(4096 * 512 / config.train.tokens_per_micro_batch / own.dp, 1)
    bubble = products * (own.pp - 1) / own.vpp / micro
    exposed = products * 0.03 * (own.tp - 1) + products * 0.05 * (own.cp - 1) + (own.vpp - 1) * 0.5
    decode = 3e8 / (held.kv_tokens * cluster.engines + 1e6) * config.rollout.tensor_parallel_size**0.2 + 50
    parts = {
        "generate": {"decode": decode, "prefill": 10.0},
        "train": {"matrix products": products, "bubble": bubble, "exposed communication": exposed},
    }
    phases = {"generate": decode + 10, "rewards": 0.0, "old_logprobs": products / 3, "train": sum(parts["train"].values()), "sync": 2.0,
              "save": 0.1, "other": 3.0}  # fmt: skip
    step = sum(phases.values())
    hours = step * config.train.steps * cluster.gpus / 3600
    return Times(phases, parts, {"synced bytes": 65e9}, step, 1e9 / step / cluster.gpus, hours, step * config.train.steps / 86400,
                 config.train.steps, 2.0)  # fmt: skip

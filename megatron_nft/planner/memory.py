"""Bytes of the fullest GPU, phase by phase."""

import math
from dataclasses import dataclass, field

from megatron_nft.batching import LENGTH_MULTIPLE
from megatron_nft.config import Config, max_model_len
from megatron_nft.errors import UserError
from megatron_nft.planner import engine_memory, parameters, trainer_memory
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.planner.engine_memory import Engine
from megatron_nft.planner.saves import checkpoint_bytes
from megatron_nft.planner.trainer_memory import Trainer
from megatron_nft.planner.weight_stream import stream
from megatron_nft.sizes import check_layout, check_ranks

PHASES = ("generate", "old_logprobs", "train", "sync", "save")
# Of the vendor's figure, what a process can have: torch's out-of-memory messages tell of 79.1 GiB on an H100 or A100 of 80, 139.7 on an
# H200 of 141, 178.4 on a B200 of 180.
USABLE = 0.988
LONGEST = 2**20  # slots: no micro-batch is looked for beyond
UNEVEN = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
}


@dataclass(frozen=True)
class Memory:
    """phases: of every phase the bytes of each part on the fullest GPU, named in words that a chart can print ("weights", "gradients",
    "optimizer", "activations", "log-prob chunks", "NCCL and CUDA", "vLLM weights", "KV cache", "CUDA graphs" ...). Served mode: the
    trainers' GPUs; servers: the servers' own."""

    phases: dict[str, dict[str, int]]
    servers: dict[str, int]  # empty where colocated
    host: dict[str, int]  # bytes of a node's memory: what is offloaded, staged for a save, pinned
    limit: int  # bytes of a GPU that can be used
    kv_tokens: int  # that fit into an engine's KV cache
    largest_micro_batch: int  # train.tokens_per_micro_batch that fits at most: its context-parallel ranks share it; 0: none fits
    longest_response: int  # tokens, behind the longest prompt, that both the engine and the trainer hold; 0: none
    window: int = 0  # tokens of the longest prompt and answer: a KV cache that holds fewer keeps vLLM from starting
    facts: dict[str, float] = field(default_factory=dict)  # further numbers by name

    @property
    def over(self) -> dict[str, int]:
        """By phase (and "servers"), bytes beyond the limit; those phases only that do not fit."""
        every = self.phases | ({"servers": self.servers} if self.servers else {})
        used = {name: sum(parts.values()) for name, parts in every.items()}
        return {name: nbytes - self.limit for name, nbytes in used.items() if nbytes > self.limit}

    @property
    def fits(self) -> bool:
        """In every phase; and the KV cache holds an answer of full length."""
        return not self.over and self.kv_tokens >= self.window


def memory(config: Config, hf: dict, cluster: Cluster) -> Memory:
    """hf: the model's config.json. Raises UserError for a layout that does not suit the model."""
    layout, limit = layout_for(config, hf, cluster), int(USABLE * cluster.gpu.memory)
    engine = engine_memory.engine(hf, config, limit)
    trainer = Trainer(config, hf, layout, engine, stream(hf, config, layout))
    phases = {phase: trainer.fullest(phase, config.train.tokens_per_micro_batch) for phase in PHASES}
    largest = _largest(trainer, limit)
    most = min(engine.kv_tokens, largest, hf.get("max_position_embeddings") or LONGEST)
    served = config.rollout.mode == "served"
    return Memory(
        phases=phases,
        servers=trainer_memory.server(trainer) if served else {},
        host=trainer.host(cluster.gpus_per_node),
        limit=limit,
        kv_tokens=engine.kv_tokens,
        largest_micro_batch=largest,
        longest_response=max(most - config.data.max_prompt_length, 0),
        window=max_model_len(config),
        facts=_facts(trainer, hf, engine),
    )


def layout_for(config: Config, hf: dict, cluster: Cluster) -> Layout:
    """The layout of a model on a cluster. Raises UserError where one does not suit the other."""
    parameters.table_of(hf)
    for name in UNEVEN & config.megatron.transformer.keys():
        raise UserError(f"megatron.transformer.{name} is set, and the planner deals layers evenly", "plan without it")
    check_ranks(config.parallel, cluster.trainers)
    check_layout(hf, config)
    return Layout.of(config, cluster)


def slot_multiple(tp: int, cp: int) -> int:
    """Slots of micro-batches that are looked at are multiples of this: all ranks can share them."""
    return math.lcm(LENGTH_MULTIPLE, 2 * cp, cp * tp)


def _largest(trainer: Trainer, limit: int) -> int:
    """Slots of the largest micro-batch that fits training and old log-probs."""
    unit = slot_multiple(trainer.layout.tp, trainer.layout.cp)

    def fits(units: int) -> bool:
        return all(sum(trainer.fullest(phase, units * unit).values()) <= limit for phase in ("train", "old_logprobs"))

    low, high = 0, LONGEST // unit + 1  # what fits (no slot does, or nothing does), what is not looked for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def _facts(trainer: Trainer, hf: dict, engine: Engine) -> dict[str, float]:
    saved = {f"{name} bytes": nbytes for name, nbytes in checkpoint_bytes(trainer.config, hf).items()}
    return {
        "parameters": parameters.total(hf),
        "parameters of a rank": max(stage.numel for stage in trainer.stages),
        "KV bytes of a token": engine.token,
        "bytes that vLLM may use": engine.requested,
        "synced bytes": trainer.stream.bytes,
        **saved,
    }

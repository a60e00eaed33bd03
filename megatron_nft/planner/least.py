"""What a run cannot do without on the fullest GPU: exact bytes alone, and none of the planner's estimates. What is more than a GPU has
certainly does not fit; what is less may not fit either."""

import math
from dataclasses import dataclass

from megatron_nft.config import Config, max_model_len
from megatron_nft.planner import engine_memory
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.engine_memory import GIB
from megatron_nft.planner.holdings import Held, Stage
from megatron_nft.planner.memory import UNEVEN
from megatron_nft.planner.trainer_memory import ALL, LEAVING

CONTEXT = GIB // 4  # of a CUDA context with torch's kernels, at least: 0.3 to 0.6 GiB are seen
# vLLM's fields with which an engine's memory goes by other rules than gpu_memory_utilization
_OTHER_RULES = {"kv_cache_memory_bytes", "cpu_offload_gb", "num_gpu_blocks_override", "offload_backend"}
_OWN_SIZES = (None, "fp8")  # rollout.quantization whose bytes are known; other formats take fewer
_CACHES = ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

LESS_TRAINING = (
    "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size, train on more GPUs (data-parallel ranks share the "
    "optimizer's state), or set optimizer.optimizer_cpu_offload=true"
)
LESS_WHILE_SAMPLING = "lower rollout.gpu_memory_utilization, set train.offload=optimizer or all, or raise a size of parallel.*"
LESS_ENGINE = "raise rollout.tensor_parallel_size, or set rollout.quantization=fp8"


@dataclass(frozen=True)
class Need:
    """Bytes that a phase takes at least, by part; of what a GPU has, or of what vLLM may use of it; and what would help."""

    phase: str
    parts: dict[str, int]
    room: int
    room_is: str  # in words
    mend: str

    @property
    def fits(self) -> bool:
        """Whether the parts may fit."""
        return sum(self.parts.values()) <= self.room

    @property
    def told(self) -> str:
        """In words, the largest parts first."""
        largest = sorted(self.parts.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {nbytes / GIB:.1f}" for name, nbytes in largest if nbytes)
        return f"{self.phase} needs at least {sum(self.parts.values()) / GIB:.1f} GiB ({parts}) of {self.room / GIB:.1f} {self.room_is}"


def trainer(config: Config, hf: dict, ranks: int, memory: int, engine: bool) -> list[Need]:
    """Of a GPU of `memory` bytes that trains, one of `ranks`; engine: an engine of its process writes the answers. Nothing is told of
    layers that are dealt unevenly. The layout has to suit the model."""
    if UNEVEN & config.megatron.transformer.keys():
        return []
    stages = Stage.all(hf, config, Layout.of_ranks(config, ranks))
    held = max((stage.fullest for stage in stages), key=lambda own: own.device)
    needs = [Need("training", _kept(held, ALL), memory, "on this GPU", LESS_TRAINING)]
    if engine and not _OTHER_RULES & config.rollout.vllm.keys():
        staying = max((_kept(stage.fullest, ALL - LEAVING[config.train.offload or "gradients"]) for stage in stages),
                      key=lambda parts: sum(parts.values()))  # fmt: skip
        share = config.rollout.gpu_memory_utilization
        asked = {f"vLLM with rollout.gpu_memory_utilization {share:g}": math.ceil(share * memory)}
        needs.append(Need("generating", staying | asked, memory, "on this GPU", LESS_WHILE_SAMPLING))
        needs += engine_needs(config, hf, max_model_len(config), memory)
    return needs


def engine_needs(config: Config, hf: dict, window: int, memory: int) -> list[Need]:
    """Of a GPU of a vLLM engine, whose KV cache has to hold one answer: `window` tokens. Nothing is told of formats whose bytes are not
    known here."""
    rollout, window = config.rollout, min(window, hf.get("max_position_embeddings") or window)
    if _OTHER_RULES & rollout.vllm.keys() or rollout.quantization not in _OWN_SIZES or rollout.kv_cache_dtype not in _CACHES:
        return []
    parts = {
        "weights": engine_memory.weights(hf, config),
        "the KV cache of one answer": window * engine_memory.token_bytes(hf, config),
    }
    room = math.ceil(rollout.gpu_memory_utilization * memory)
    mend = LESS_ENGINE + ("" if rollout.gpu_memory_utilization >= 0.9 else ", or raise rollout.gpu_memory_utilization")
    return [Need("the vLLM engine", parts, room, "that rollout.gpu_memory_utilization gives it", mend)]


def _kept(held: Held, kinds: set[str]) -> dict[str, int]:
    return {kind: getattr(held, kind) for kind in ("weights", "gradients", "optimizer") if kind in kinds} | {"CUDA's context": CONTEXT}

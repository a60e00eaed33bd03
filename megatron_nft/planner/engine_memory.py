"""What a vLLM engine takes on each of its GPUs: as vLLM 0.32 reckons at its start (determine_available_memory in v1/worker/gpu_worker.py).

It may use gpu_memory_utilization of the GPU's memory, whatever the trainer has there, and refuses to start where so much is not free. The
KV cache is what weights, the activations of its largest batch, CUDA graphs and libraries leave of it.
"""

import math
from dataclasses import dataclass

from megatron_nft.config import Config, max_model_len
from megatron_nft.errors import UserError
from megatron_nft.planner.holdings import ITEMSIZE
from megatron_nft.weights import padded_vocab_size, table_for
from megatron_nft.weights.layouts import Sizes

GIB = 2**30
VOCABULARY_MULTIPLE = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE
BLOCK = 16  # tokens of a block of the cache
# Captured graphs of all batch sizes: vLLM's logs of models of 27 to 32 billion weights on two or four GPUs say 0.2 to 1.2 GiB
# ("Estimated CUDA graph memory", "Graph capturing finished ... took").
GRAPHS = 1 * GIB
# What libraries take besides torch when an engine starts: the workspaces of FlashInfer (394 MiB) and cuBLAS, persistent inputs; the
# example in vLLM's utils/mem_utils.py has it grow from 0.5 to 1 GiB.
LIBRARIES = GIB // 2
LOGITS = 5  # float32 copies of [running answers, vocabulary] alive in the sampler: logits, processed, sorted, softmax, log-probs


@dataclass(frozen=True)
class Engine:
    """Bytes on each GPU of an engine."""

    weights: int
    activations: int
    graphs: int
    libraries: int
    requested: int  # what it may use in all
    token: int  # of the KV cache for a token

    @property
    def cache(self) -> int:
        """Of the KV cache, whole blocks; 0 where nothing is left for one."""
        block = BLOCK * self.token
        return max(self.requested - self.weights - self.activations - self.graphs - self.libraries, 0) // block * block

    @property
    def kv_tokens(self) -> int:
        """Tokens of all running answers together."""
        return self.cache // self.token

    @property
    def asleep(self) -> int:
        """What stays on the GPU while the engine sleeps: graphs and libraries. (vLLM 0.32 takes the graphs away, too; earlier ones not.)"""
        return self.graphs + self.libraries

    def parts(self) -> dict[str, int]:
        """By name, while it generates."""
        named = {"vLLM weights": self.weights, "KV cache": self.cache, "vLLM activations": self.activations}
        return named | {"CUDA graphs": self.graphs, "vLLM libraries": self.libraries}


def engine(hf: dict, config: Config, usable: int) -> Engine:
    """usable: bytes of the GPU. Raises UserError for a tensor-parallel size that the model cannot be cut by."""
    rollout, sizes = config.rollout, Sizes.of(hf)
    _check(sizes, rollout.tensor_parallel_size)
    eager = rollout.enforce_eager or rollout.cudagraph_mode == "NONE"
    return Engine(
        weights(hf, config),
        _activations(hf, config),
        0 if eager else GRAPHS,
        LIBRARIES,
        math.ceil(rollout.gpu_memory_utilization * usable),
        token_bytes(hf, config),
    )


def _check(sizes: Sizes, tp: int) -> None:
    for name, size in (("attention heads", sizes.heads), ("intermediate size", sizes.expert_ffn or sizes.ffn)):
        if size % tp:
            raise UserError(f"{name} ({size}) cannot be divided by rollout.tensor_parallel_size ({tp})", "use a divisor of it")
    if sizes.groups % tp and tp % sizes.groups:
        raise UserError(
            f"rollout.tensor_parallel_size ({tp}) neither divides the key-value heads ({sizes.groups}) nor is a multiple of them",
            "use a divisor of them",
        )


def token_bytes(hf: dict, config: Config) -> int:
    """Bytes of a token's keys and values on one GPU of an engine; where there are more GPUs than key-value heads, each has one."""
    sizes, rollout = Sizes.of(hf), config.rollout
    itemsize = 1 if rollout.kv_cache_dtype.startswith("fp8") else ITEMSIZE[config.model.precision]
    return 2 * sizes.layers * max(sizes.groups // rollout.tensor_parallel_size, 1) * sizes.head * itemsize


def weights(hf: dict, config: Config) -> int:
    """Bytes of the weights on one GPU of an engine. FP8 keeps the linear layers' in 8 bits, not embedding, head and norms."""
    sizes, tp, itemsize = Sizes.of(hf), config.rollout.tensor_parallel_size, ITEMSIZE[config.model.precision]
    linear = 1 if str(config.rollout.quantization).startswith("fp8") else itemsize
    vocabulary = padded_vocab_size(padded_vocab_size(sizes.vocabulary, 1, VOCABULARY_MULTIPLE), tp) // tp * sizes.hidden
    tables = vocabulary * (1 if sizes.tied else 2) + sizes.hidden
    return sum(cut * linear + rest * itemsize for cut, rest in map(layer_weights(hf, tp), range(sizes.layers))) + tables * itemsize


def layer_weights(hf: dict, tp: int):
    """Of a layer (counted from 0): elements on one GPU of the weights in its linear layers, and of all others."""
    table, sizes = table_for(hf), Sizes.of(hf)
    key, query, hidden = max(sizes.groups // tp, 1) * sizes.head, sizes.query // tp, sizes.hidden

    def of(layer: int) -> tuple[int, int]:
        attention = hidden * (2 * query + 2 * key)
        small = 2 * hidden + (query + 2 * key) * table.qkv_bias + 2 * sizes.head * table.qk_norm
        if table.has_experts(layer):
            return attention + 3 * sizes.experts * sizes.expert_ffn // tp * hidden, small + sizes.experts * hidden
        return attention + 3 * sizes.ffn // tp * hidden, small

    return of


def _activations(hf: dict, config: Config) -> int:
    """Bytes at the peak of vLLM's trial run: the largest batch in one layer, or the sampler with as many answers as can run."""
    sizes, rollout = Sizes.of(hf), config.rollout
    tp, itemsize = rollout.tensor_parallel_size, ITEMSIZE[config.model.precision]
    experts = hf.get("num_experts_per_tok", 1) if sizes.experts else 1
    inner = experts * ((sizes.expert_ffn or sizes.ffn) * 3 // tp + (sizes.hidden if sizes.experts else 0))
    attention = (2 * sizes.query + 4 * sizes.key) // tp
    layer = rollout.max_num_batched_tokens * itemsize * (3 * sizes.hidden + max(inner, attention))
    return max(layer, LOGITS * rollout.max_num_seqs * sizes.vocabulary * 4)


def window(config: Config) -> int:
    """Tokens that an engine's cache must hold at least: vLLM does not start with less."""
    return max_model_len(config)

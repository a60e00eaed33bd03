"""What a vLLM engine takes on each of its GPUs: as vLLM 0.32 reckons at its start (determine_available_memory in v1/worker/gpu_worker.py).

It may use gpu_memory_utilization of the GPU's memory, whatever the trainer has there, and refuses to start where so much is not free. The
KV cache is what weights, the activations of its largest batch, CUDA graphs and libraries leave of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.planner.holdings import ITEMSIZE
from megatron_nft.planner.parameters import table_of
from megatron_nft.weights import padded_vocab_size
from megatron_nft.weights.layouts import Sizes

GIB = 2**30
VOCABULARY_MULTIPLE = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE
BLOCK = 16  # tokens of a block of the cache: vLLM's default block_size
# Captured graphs of all batch sizes: vLLM's logs of models of 27 to 32 billion weights on two or four GPUs say 0.2 to 1.2 GiB
# ("Estimated CUDA graph memory", "Graph capturing finished ... took").
GRAPHS = 1 * GIB
# What an engine takes beside torch and the CUDA context, kernels and workspaces: of Llama 3 8B on one H100, vllm-project/vllm pull request
# 10511 shows 1.79 GiB with the context (trainer_memory.CONTEXT).
LIBRARIES = int(1.2 * GIB)
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
    loading: int  # of the largest layer, which stands beside the one in use while new weights come
    block: int = BLOCK  # tokens

    @property
    def cache(self) -> int:
        """Of the KV cache, whole blocks; 0 where nothing is left for one."""
        block = self.block * self.token
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
        _largest_layer(hf, config),
        rollout.vllm.get("block_size") or BLOCK,
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
    tables = _vocabulary(sizes, tp) * (1 if sizes.tied else 2) + sizes.hidden
    return sum(cut * linear + rest * itemsize for cut, rest in _layers(hf, tp)) + tables * itemsize


def _vocabulary(sizes: Sizes, tp: int) -> int:
    """Elements of the embedding, or of the head, on one GPU."""
    return padded_vocab_size(padded_vocab_size(sizes.vocabulary, 1, VOCABULARY_MULTIPLE), tp) // tp * sizes.hidden


def _layers(hf: dict, tp: int) -> Iterator[tuple[int, int]]:
    """Of each layer, elements on one GPU of the weights in its linear layers, and of all others."""
    table, sizes = table_of(hf), Sizes.of(hf)
    key, query, hidden = max(sizes.groups // tp, 1) * sizes.head, sizes.query // tp, sizes.hidden
    attention = hidden * (2 * query + 2 * key)
    small = 2 * hidden + (query + 2 * key) * table.qkv_bias + 2 * sizes.head * table.qk_norm
    for layer in range(sizes.layers):
        if table.has_experts(layer):
            yield attention + 3 * sizes.experts * sizes.expert_ffn // tp * hidden, small + sizes.experts * hidden
        else:
            yield attention + 3 * sizes.ffn // tp * hidden, small


def _largest_layer(hf: dict, config: Config) -> int:
    """Bytes on one GPU, before they are quantised, of the most weights that one of vLLM's modules holds: a layer's MLP or all its experts,
    or the embedding."""
    sizes, tp = Sizes.of(hf), config.rollout.tensor_parallel_size
    inner = 3 * sizes.experts * sizes.expert_ffn if sizes.experts else 2 * sizes.ffn  # gate and up in one
    return max(inner // tp * sizes.hidden, _vocabulary(sizes, tp)) * ITEMSIZE[config.model.precision]


def _activations(hf: dict, config: Config) -> int:
    """Bytes at the peak of vLLM's trial run: the largest batch in one layer, or the sampler with as many answers as can run."""
    sizes, rollout = Sizes.of(hf), config.rollout
    tp, itemsize = rollout.tensor_parallel_size, ITEMSIZE[config.model.precision]
    experts = hf.get("num_experts_per_tok", 1) if sizes.experts else 1
    inner = experts * ((sizes.expert_ffn or sizes.ffn) * 3 // tp + (sizes.hidden if sizes.experts else 0))
    attention = (2 * sizes.query + 4 * sizes.key) // tp
    layer = rollout.max_num_batched_tokens * itemsize * (3 * sizes.hidden + max(inner, attention))
    return max(layer, LOGITS * rollout.max_num_seqs * sizes.vocabulary * 4)

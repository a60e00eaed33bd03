"""Seconds of one step of a vLLM engine's scheduler: each running answer gets one token, and prompts are read.

step = products (weights read, or operations) + attention (KV cache read) + 2 all-reduces a layer + head and sampling + host
"""

from dataclasses import dataclass

import numpy as np

from megatron_nft.config import Config
from megatron_nft.flops import linear_flops
from megatron_nft.planner import kernels
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.hardware import Gpu, check_fp8
from megatron_nft.weights.layouts import Sizes

CACHE_SHARE = 0.60  # of the memory's bandwidth, by paged attention: blocks of 16 tokens, uneven contexts (0.6 to 0.75 by kernels alone)
LAYER_KERNELS = 22e-6  # seconds of a layer's small kernels in a CUDA graph: norms, rotation, cache, activation: 8 to 10 of 2 to 3 us
EAGER_KERNELS = 16  # kernels of a layer that Python starts where nothing is captured
ALL_REDUCE = {1: 0.0, 2: 6e-6, 4: 9e-6, 8: 12e-6}  # seconds of vLLM's own small all-reduce over NVLink, by tensor-parallel size
ALL_REDUCE_SHARE = 0.55  # of NVLink's rate, by messages of some MB
SAMPLING_PASSES = 12  # times that float32 logits of the whole vocabulary are read or written: cast, temperature, log-softmax, ranks, draw
SCHEDULER = (2.5e-3, 9e-6)  # seconds of the CPU a step, and for each running answer: vLLM V1's scheduler, input and output without overlap
# Colocated engines wait for each other in sums over ranks on the CPU: gloo's ring takes 2 (n - 1) messages, one after the other
GLOO_HOP = 20e-6  # seconds of such a message, over loopback or Ethernet
TELL_EVERY = 8  # scheduler steps between two sums that tell of verdicts, as rollout/sampler.py has it; 1 where there is one engine
ASK_EVERY = 8  # of these sums between two more, which ask whether the run is to stop: rollout/engine.py's
# vLLM couples the engines of a mixture of experts: in each step they agree whether one has answers, and on the batch's size
# (has_unfinished_dp, coordinate_batch_across_dp)
COUPLING_SUMS = 2


@dataclass(frozen=True)
class Engine:
    """What a scheduler step's time depends on. Frozen and hashable: simulations of the same are made once."""

    gpu: Gpu
    tp: int
    layers: int
    hidden: int
    vocabulary: int
    weights: float  # that a token meets, head excluded
    held: float  # of these a batch reads at most: all experts of a mixture
    kv_bytes: float  # of a token, over all layers and ranks
    quantized: bool
    eager: bool
    slots: int  # answers that may run at a time
    kv_tokens: int
    lockstep: int  # ranks whose engines wait for each other; 0: engines for themselves
    coupled: bool = False  # in each step, by vLLM

    @classmethod
    def of(cls, config: Config, hf: dict, cluster: Cluster, kv_tokens: int) -> "Engine":
        """Raises UserError for FP8 on a GPU that has none."""
        rollout, sizes = config.rollout, Sizes.of(hf)
        for asked in ("quantization", "kv_cache_dtype"):
            if "fp8" in str(getattr(rollout, asked)):
                check_fp8(cluster.gpu, f"rollout.{asked}")
        head = sizes.vocabulary * sizes.hidden
        active = linear_flops(hf) / 2 - head
        experts = 3 * sizes.hidden * sizes.expert_ffn * (sizes.experts - hf.get("num_experts_per_tok", 0)) if sizes.experts else 0
        served = rollout.mode == "served"
        longest = config.plan.mean_prompt_length + rollout.max_tokens
        return cls(
            gpu=cluster.gpu, tp=rollout.tensor_parallel_size, layers=sizes.layers, hidden=sizes.hidden, vocabulary=sizes.vocabulary,
            weights=active, held=active + sizes.layers * experts,
            kv_bytes=sizes.layers * 2 * sizes.key * (1 if "fp8" in rollout.kv_cache_dtype else 2),
            quantized=rollout.quantization == "fp8", eager=rollout.enforce_eager,
            slots=max(rollout.max_num_seqs, 1), kv_tokens=max(kv_tokens, longest),
            lockstep=0 if served else cluster.engines * rollout.tensor_parallel_size,
            coupled=sizes.experts > 0 and not served,
        )  # fmt: skip

    def seconds(self, running: np.ndarray, context: np.ndarray, prompts: np.ndarray | float = 0.0) -> np.ndarray:
        """Of a step. running: answers that run on each engine; context: tokens they have, in all; prompts: tokens read in this step. Arrays
        of one shape. Engines without answers take no time."""
        running, context = np.asarray(running, float), np.asarray(context, float)
        return np.where(running > 0, self._gpu_part(running, context, np.asarray(prompts, float)) + self.host(running), 0.0)

    def _gpu_part(self, rows: np.ndarray, context: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        gpu, tp, head = self.gpu, self.tp, self.vocabulary * self.hidden
        products = kernels.product_of_few_rows(
            gpu, rows + prompts, self.weights / tp, self.held / tp * (1 if self.quantized else 2), self.quantized
        )
        products = products + kernels.product_of_few_rows(gpu, rows, head / tp, 2 * head / tp, fp8=False)
        cache = context * self.kv_bytes / tp / (gpu.bandwidth * CACHE_SHARE)
        sampled = kernels.moved(gpu, 4.0 * rows * self.vocabulary * SAMPLING_PASSES)
        small = self.layers * (self._launches + 2 * self._all_reduce(rows + prompts))
        return products + cache + sampled + small

    @property
    def _launches(self) -> float:
        return max(LAYER_KERNELS, EAGER_KERNELS * self.gpu.achieved.launch) if self.eager else LAYER_KERNELS

    def _all_reduce(self, rows: np.ndarray) -> np.ndarray | float:
        if self.tp == 1:
            return 0.0
        nbytes = 2 * (self.tp - 1) / self.tp * 2.0 * rows * self.hidden
        return ALL_REDUCE.get(self.tp, 15e-6) + nbytes / (self.gpu.nvlink * self.gpu.achieved.nvlink * ALL_REDUCE_SHARE)

    def host(self, running: np.ndarray) -> np.ndarray:
        """Seconds of a step in which the GPU waits."""
        return SCHEDULER[0] + SCHEDULER[1] * running + self._sums

    @property
    def _sums(self) -> float:
        """Seconds of a step, on average, in which engines wait for each other's numbers."""
        engines = self.lockstep // self.tp
        told = _sum(self.lockstep) * (1 + 1 / ASK_EVERY) / (TELL_EVERY if engines > 1 else 1)
        return told + self.coupled * COUPLING_SUMS * _sum(engines)


def _sum(ranks: int) -> float:
    """Seconds of a sum over ranks on the CPU."""
    return 2 * max(ranks - 1, 0) * GLOO_HOP

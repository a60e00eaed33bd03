"""Seconds of what stands between generating and training: weights to the engines, memory that comes and goes, saves, validation."""

from dataclasses import dataclass

from megatron_nft.config import Config, set_sampling
from megatron_nft.planner.communication import HOST_SHARE, NETWORK_SHARE
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.generation import Order, simulate
from megatron_nft.planner.kernels import moved
from megatron_nft.planner.training_time import Training
from megatron_nft.planner.workload import Workload

# vLLM's reload of weights handles each tensor in Python: NeMo-RL and verl need 1 to 3 ms for one (verl's 14.2 s for Qwen2.5-32B over NCCL,
# 6.2 s for the changed tensors alone, PEERS.md: 771 tensors of 8 to 18 ms with 65 GB on the way)
PER_TENSOR = 3e-3
PER_BUCKET = 4e-3  # an all-gather's and a broadcast's start, packing and unpacking
TENSORS_OF_LAYER = 12  # of a dense layer under Hugging Face's names; biases and norms included
# Waking and sleeping: vLLM's sleep mode frees and maps again the physical memory of weights and cache: its blog of 2025-10-26 has 0.1 to 1 s
# for level 2, which leaves the weights behind
WAKE, SLEEP = 1.0, 0.7
SAVE_PLANNING = 4.0  # seconds of Megatron's checkpoint plan, on all ranks, before the copy: measured there at 100 to 1,000 ranks
DISK = 1e9  # bytes a second and node that a parallel file system takes
VERDICTS = 1.0  # seconds until the last answers' verdicts are there: the others are made while answers are written
BATCHING = 2.0  # seconds of placing and exchanging answers, rollouts/ and logs on the way: each rank writes its own
SIZES = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "olympiadbench": 675, "minerva": 272}  # problems of the benchmarks
UNKNOWN_SIZE = 500  # problems of a set that is none of these and has no limit


@dataclass(frozen=True)
class Sync:
    """Weights to the engines."""

    parts: dict[str, float]  # seconds
    nbytes: float  # of the model, as it is sent


def sync(config: Config, training: Training) -> Sync:
    """Each bucket is broadcast over the stages and gathered over tensor-parallel ranks, then read by the engine in place. Served: the first
    trainers send buckets to the servers' GPUs, over the network."""
    sizes, cut, gpu = training.sizes, training.layout, training.gpu
    nbytes = 2.0 * model_parameters(training)
    tensors = sizes.layers * (TENSORS_OF_LAYER + 3 * sizes.experts) + 3
    buckets = nbytes / (config.rollout.update_weights_bucket_megabytes * 2**20)
    across = training.stages.send(nbytes / cut.tp) if cut.pp > 1 else 0.0
    gathered = training.tensor.gather(nbytes)
    parts = {"stages to all": across, "gathered": gathered, "reload": tensors * PER_TENSOR + buckets * PER_BUCKET + moved(gpu, 3 * nbytes)}
    if config.rollout.mode == "served":
        parts["to servers"] = nbytes / (gpu.network * NETWORK_SHARE)
    else:
        parts["wake and sleep"] = WAKE + SLEEP
    return Sync(parts, nbytes)


def model_parameters(training: Training) -> float:
    """Of the whole model."""
    sizes = training.sizes
    experts = 3 * sizes.hidden * sizes.expert_ffn * sizes.experts if sizes.experts else 3 * sizes.hidden * sizes.ffn
    layer = sizes.hidden * (2 * sizes.query + 2 * sizes.key) + experts + 2 * sizes.hidden
    return sizes.layers * layer + (1 if sizes.tied else 2) * sizes.vocabulary * sizes.hidden + sizes.hidden


def checkpoint_bytes(config: Config, training: Training) -> float:
    """BF16 parameters, and main parameters and moments in their dtypes."""
    size = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
    optimizer = config.optimizer
    state = sum(size[dtype] for dtype in (optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    return model_parameters(training) * (2 + state)


def save_stall(config: Config, training: Training) -> float:
    """Seconds that training waits for a save: the plan and the copy to the host; without async_save the writing, too."""
    cluster, nbytes = training.cluster, checkpoint_bytes(config, training)
    stall = SAVE_PLANNING + nbytes / cluster.trainers / (cluster.gpu.host * HOST_SHARE)
    return stall if config.checkpoint.async_save else stall + nbytes / (DISK * cluster.nodes)


def kept_checkpoints(config: Config) -> int:
    """On disk at a time: those that are kept, and one that is being written."""
    best = config.checkpoint.keep_best
    if best is None:
        every, saves = config.evaluation.interval, config.checkpoint.interval
        best = 1 if config.evaluation.sets and every and saves and saves % every == 0 else 0
    return config.checkpoint.keep + best + 1


def offload(config: Config, training: Training) -> float:
    """Seconds of a step for what leaves the GPU while vLLM generates, and comes back. Gradients are freed, not copied."""
    level, link = config.train.offload or "gradients", training.gpu.host * HOST_SHARE
    if config.rollout.mode == "served":
        return 0.0
    state = training.parameters / training.data.size * (checkpoint_bytes(config, training) / model_parameters(training) - 2)
    if config.optimizer.optimizer_cpu_offload:
        state *= 1 - config.optimizer.optimizer_offload_fraction
    nbytes = {"none": 0.0, "gradients": 0.0, "optimizer": state, "all": state + 2 * training.parameters}[level]
    return 2 * nbytes / link


def validation(config: Config, engine: Engine, engines: int) -> float:
    """Seconds of one validation of all sets."""
    plan, seconds = config.plan, 0.0
    by_cap: dict[int, int] = {}
    for dataset in config.evaluation.sets:
        sampling = set_sampling(config, dataset)
        problems = dataset.limit or SIZES.get(dataset.benchmark or "", UNKNOWN_SIZE)
        cap = sampling.max_tokens
        by_cap[cap] = by_cap.get(cap, 0) + problems * sampling.answers
    for cap, answers in by_cap.items():
        mean = plan.mean_response_length or config.rollout.max_tokens / 4
        work = Workload(answers, 1, plan.mean_prompt_length, mean, plan.response_length_sigma, cap, 1.0, answers)
        seconds += simulate(work, Order(answers, answers, False, False, 0, False, 0, None), engine, engines).seconds
    return seconds

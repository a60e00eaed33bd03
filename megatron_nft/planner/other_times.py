"""Seconds of what stands between generating and training: weights to the engines, memory that comes and goes, saves, validation."""

from dataclasses import dataclass

from megatron_nft.config import Config, set_sampling
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.generation import Order, simulate
from megatron_nft.planner.holdings import MASTER, MOMENTS
from megatron_nft.planner.kernels import moved
from megatron_nft.planner.parameters import total
from megatron_nft.planner.saves import checkpoint_bytes
from megatron_nft.planner.training_time import Training
from megatron_nft.planner.workload import Workload

# Assumed, with nothing published for this very way; verl's sync of Qwen2.5-32B by NCCL takes 14.2 s, 6.2 s where only changes are sent:
# vLLM's reload handles each tensor in Python.
PER_TENSOR = 5e-3
PER_BUCKET = 10e-3  # the start of an all-gather and a broadcast, packing and unpacking
TENSORS_OF_LAYER = 12  # of a dense layer under Hugging Face's names; biases and norms included
WAKE, SLEEP = 1.0, 0.7  # assumed: memory of weights and cache is mapped again, and freed (vLLM's sleep mode, level 2: nothing is copied)
SAVE_PLANNING = 4.0  # assumed: Megatron's checkpoint plan on all ranks, before the copy to the host
DISK = 1e9  # assumed: bytes a second and node that a parallel file system takes
VERDICTS = 1.0  # assumed: seconds until the last answers' verdicts are there: the others are made while answers are written
BATCHING = 2.0  # assumed: seconds of placing and exchanging answers, rollouts/ and logs on the way: each rank writes its own
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
    nbytes = 2.0 * total(training.hf)
    tensors = sizes.layers * (TENSORS_OF_LAYER + 3 * sizes.experts) + 3
    buckets = nbytes / (config.rollout.update_weights_bucket_megabytes * 2**20)
    across = training.stages.send(nbytes / cut.tp) if cut.pp > 1 else 0.0
    gathered = training.tensor.gather(nbytes)
    parts = {"stages to all": across, "gathered": gathered, "reload": tensors * PER_TENSOR + buckets * PER_BUCKET + moved(gpu, 3 * nbytes)}
    if config.rollout.mode == "served":
        parts["to servers"] = nbytes / (gpu.network * gpu.achieved.network)
    else:
        parts["wake and sleep"] = WAKE + SLEEP
    return Sync(parts, nbytes)


def save_stall(config: Config, training: Training) -> float:
    """Seconds that training waits for a save: the plan and the copy to the host; without async_save the writing, too."""
    cluster, nbytes = training.cluster, checkpoint_bytes(config, training.hf)["checkpoint"]
    stall = SAVE_PLANNING + nbytes / cluster.trainers / (cluster.gpu.host * cluster.gpu.achieved.host)
    return stall if config.checkpoint.async_save else stall + nbytes / (DISK * cluster.nodes)


def offload(config: Config, training: Training) -> float:
    """Seconds of a step for what leaves the GPU while vLLM generates, and comes back. Gradients are freed, not copied."""
    level, link = config.train.offload or "gradients", training.gpu.host * training.gpu.achieved.host
    if config.rollout.mode == "served":
        return 0.0
    state = training.parameters / training.data.size * (MASTER + MOMENTS)
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

"""Whether a run fits the GPU that is there, before anything is allocated: refused is what certainly cannot; what the planner's estimate
says not to fit is only told of."""

import os
import sys
from dataclasses import replace

from megatron_nft import policy
from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.planner import least
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.hardware import GPUS
from megatron_nft.planner.least import Need
from megatron_nft.planner.memory import USABLE, memory
from megatron_nft.planner.plan import shortages
from megatron_nft.policy.devices import Gpu, own_gpu
from megatron_nft.weights import load_weights


def check_trainer(config: Config, sampling: bool, ranks: int | None = None) -> None:
    """Of a rank that trains, one of `ranks` (None: as many as were started); sampling: `train`, whose colocated engine is in the same
    process. Raises UserError where its GPU is certainly too small. Does nothing without a GPU. policy.check has found the layout right.
    """
    if gpu := own_gpu():
        engine = sampling and config.rollout.mode == "colocated" and not config.replay
        _refuse(gpu, least.trainer(config, _hf(config), ranks or policy.world_size(), gpu.memory, engine))


def check_engine(config: Config, window: int) -> None:
    """Of a rank that evaluates or serves answers of up to `window` tokens. Raises UserError where its GPU is certainly too small. Does
    nothing without a GPU."""
    if gpu := own_gpu():
        _refuse(gpu, least.engine_needs(config, _hf(config), window, gpu.memory))


def warn(config: Config) -> None:
    """Print, on the first rank, what the planner's estimate says not to fit of a training, and go on: it is no certainty."""
    if os.environ.get("RANK", "0") == "0" and (told := shortage(config)):
        print(f"megatron-nft: warning: {told}", file=sys.stderr, flush=True)


def shortage(config: Config) -> str | None:
    """The first thing that does not fit by estimate, with as many ranks as were started; None: all fits, there is no GPU, or nothing can be
    told."""
    gpu = own_gpu()
    if gpu is None or config.replay:
        return None
    try:
        reasons = shortages(config, memory(config, _hf(config), _cluster(config, gpu)))
    except UserError:  # of a layout that the planner does not reckon with
        return None
    return f"{reasons[0]}, as the planner estimates: it may run out of memory (megatron-nft plan has the parts)" if reasons else None


def _hf(config: Config) -> dict:
    return load_weights(config.model.path).config


def _refuse(gpu: Gpu, needs: list[Need]) -> None:
    for need in needs:
        if not need.fits:
            raise UserError(f"GPU {gpu.number} ({gpu.name}) is too small for this config: {need.told}", need.mend)


def _cluster(config: Config, gpu: Gpu) -> Cluster:
    """Of as many GPUs as ranks were started, with this one's memory: all that an estimate of memory asks for."""
    ranks = policy.world_size()
    ranks_of_a_node = min(int(os.environ.get("LOCAL_WORLD_SIZE", config.plan.gpus_per_node)), ranks)
    rollout, own = config.rollout, replace(GPUS["H100"], name=gpu.name, memory=int(gpu.memory / USABLE))
    engines = rollout.served.count if rollout.mode == "served" else max(ranks // rollout.tensor_parallel_size, 1)
    return Cluster(own, max(ranks // ranks_of_a_node, 1), ranks_of_a_node, ranks, engines)

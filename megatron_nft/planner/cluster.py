"""The cluster that a plan is for, and the layout of a config on it."""

from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.planner.hardware import Gpu, find
from megatron_nft.planner.measured import applied


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, so many to a node."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    trainers: int  # GPUs that train: all of them, but for those of servers
    engines: int  # vLLM engines that write the answers: in the trainers' processes, or servers

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    @classmethod
    def of(cls, config: Config) -> "Cluster":
        """From config.plan and rollout.mode. Raises UserError for an unknown GPU, a measurement of another one, no number of nodes, GPUs
        that engines cannot share."""
        plan, tp = config.plan, config.rollout.tensor_parallel_size
        if plan.nodes is None:
            raise UserError("plan.nodes has no value", "say for how many nodes: plan.nodes=16 (and plan.gpu, plan.gpus_per_node)")
        gpus = plan.nodes * plan.gpus_per_node
        served = config.rollout.served.count * tp if config.rollout.mode == "served" else 0
        if served >= gpus:
            raise UserError(
                f"{config.rollout.served.count} servers of {tp} GPUs leave none of {gpus} to train on", "lower rollout.served.count"
            )
        trainers = gpus - served
        if not served and trainers % tp:
            raise UserError(f"{trainers} GPUs cannot be divided by rollout.tensor_parallel_size ({tp})", "change it, or plan.nodes")
        engines = config.rollout.served.count if served else trainers // tp
        return cls(applied(find(plan.gpu), plan.measured), plan.nodes, plan.gpus_per_node, trainers, engines)


@dataclass(frozen=True)
class Layout:
    """Megatron's cut of the trainers' GPUs, by its sizes; Megatron's ranks go tensor, context, data, pipeline from the inside."""

    tp: int
    pp: int
    cp: int
    dp: int
    vpp: int  # chunks of layers a stage holds; 1: not interleaved
    ep: int
    etp: int
    sequence_parallel: bool

    @classmethod
    def of(cls, config: Config, cluster: Cluster) -> "Layout":
        """Raises UserError for sizes whose product does not divide the trainers."""
        return cls.of_ranks(config, cluster.trainers)

    @classmethod
    def of_ranks(cls, config: Config, trainers: int) -> "Layout":
        """The same, of so many GPUs that train."""
        parallel = config.parallel
        tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
        if trainers % (tp * pp * cp):
            raise UserError(
                f"{trainers} GPUs that train cannot be divided by TP x PP x CP ({tp} x {pp} x {cp})",
                "change parallel.* or plan.nodes",
            )
        return cls(
            tp, pp, cp, trainers // (tp * pp * cp), parallel.virtual_pipeline_model_parallel_size or 1,
            parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tp, parallel.sequence_parallel,
        )  # fmt: skip

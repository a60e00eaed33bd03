"""What of a plan can be refused by looking at the settings, the cluster's shape and the model's window: before torch is imported."""

from megatron_nft.config import Config, check_budget, max_model_len
from megatron_nft.errors import UserError
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.planner.models import Model, find

MOST_NODES, LONGEST = 2**16, 2**20  # no cluster has more; tokens, beyond every window


def check(config: Config) -> Model:
    """What can be refused without any arithmetic, and without torch: raises UserError for an unknown GPU, a cluster whose shape does not
    match the layout, a model that is not to be found, and settings that no memory would make right."""
    _check_workload(config)
    layout = Layout.of(config, Cluster.of(config))
    _check_place(config, layout)
    model = find(config.model.path)
    window, longest = model.hf.get("max_position_embeddings"), max_model_len(config)
    if isinstance(window, int) and longest > window:
        raise UserError(
            f"the longest prompt with the longest answer has {longest} tokens, more than the model's window ({window})",
            "lower data.max_prompt_length, rollout.max_tokens or evaluation.max_tokens",
        )
    check_budget(config)
    return model


def _check_workload(config: Config) -> None:
    """What config.plan says of answers: lengths and shares that there can be. Also refuses what is no number."""
    own = config.plan
    for name, value, least, most in (
        ("mixed_share", own.mixed_share, 0.01, 1.0),
        ("response_length_sigma", own.response_length_sigma, 0.0, 4.0),
        ("mean_response_length", own.mean_response_length, 1, LONGEST),
        ("mean_prompt_length", own.mean_prompt_length, 1, LONGEST),
        ("nodes", own.nodes, 1, MOST_NODES),
        ("gpus_per_node", own.gpus_per_node, 1, MOST_NODES),
    ):
        if value is not None and not least <= value <= most:
            raise UserError(f"plan.{name} is {value}", f"use a number from {least} to {most}")


def _check_place(config: Config, layout: Layout) -> None:
    """Tensor-parallel ranks talk all the time: those of a group stand in one node."""
    each = config.plan.gpus_per_node
    for name, size in (
        ("parallel.tensor_model_parallel_size", layout.tp),
        ("rollout.tensor_parallel_size", config.rollout.tensor_parallel_size),
    ):
        if (size > each or each % size) and config.plan.nodes > 1:
            raise UserError(
                f"{name} ({size}) and plan.gpus_per_node ({each}) do not divide: a group of ranks would stand on two nodes",
                "change one of them",
            )

"""Updates of a fixed rollout with the policy's memory off the device in between, and what came out (rank 0)."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_nft import objectives, policy
from megatron_nft.config import Config, load
from tests.support import made_up_groups, micro_batches_of


def bytes_of(model: policy.Policy) -> list[int]:
    """Of the storages that are behind gradients, parameters and Adam's state, float32 copies included."""
    [adam] = model.optimizer.chained_optimizers
    state = [value for values in adam.optimizer.state.values() for value in values.values()]
    state += [p for group in adam.optimizer.param_groups for p in group["params"]]
    kinds = ([b.grad_data for b in model.chunks[0].buffers], [b.param_data for b in model.chunks[0].buffers], state)
    return [sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in kinds]


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    config: Config = load(arguments["config"], arguments["overrides"])
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology)
    before = {name: tensor.clone() for name, tensor in model.weights()}
    groups = made_up_groups()[topology.rank :: topology.world_size]
    _, mini_batches = micro_batches_of(model, groups)
    out = {
        "old": model.fill_old_logprobs([b for batches in mini_batches for b in batches], config.objective),
        "updates": [],
        "left": [],  # bytes of gradients, parameters and optimizer state before and after every update
        "before": before,
    }
    objective = partial(objectives.loss, settings=config.objective)
    for batches in mini_batches:
        model.offload()
        out["left"].append(bytes_of(model))
        out["updates"].append(model.update(batches, objective, objectives.METRICS))
        list(model.hand_over())  # as to a sampler on the same device
        model.offload()
        out["left"].append(bytes_of(model))
    out["after"] = {name: tensor.clone() for name, tensor in model.weights()}
    model.offload()
    if arguments["save"]:
        model.save(Path(arguments["output"]).with_suffix(f".{config.train.offload}"), {})
    if topology.is_first:
        torch.save(out, arguments["output"])
    policy.shutdown()


if __name__ == "__main__":
    main()

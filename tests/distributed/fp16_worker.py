"""Updates in float16: one that holds, one whose gradients overflow, and the loss scale through a checkpoint."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_nft import objectives, policy
from megatron_nft.config import load
from tests.support import made_up_groups, micro_batches_of


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    config = load(arguments["config"], arguments["overrides"])
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology)
    groups = made_up_groups()[topology.rank :: topology.world_size]
    _, mini_batches = micro_batches_of(model, groups)
    model.fill_old_logprobs([b for batches in mini_batches for b in batches], config.objective)
    objective = partial(objectives.loss, settings=config.objective)
    parameters, updates = [snapshot(model)], []
    for batches in mini_batches:
        updates.append(model.update(batches, objective, objectives.METRICS))
        parameters.append(snapshot(model))
    checkpoint = Path(arguments["output"]).with_name("checkpoint")
    model.save(checkpoint, {})
    other = policy.Policy(config, topology)
    before = other.optimizer.state_dict()["grad_scaler"]
    other.load(checkpoint)
    scalers = [
        s if isinstance(s, dict) else s[0]
        for s in (before, model.optimizer.state_dict()["grad_scaler"], other.optimizer.state_dict()["grad_scaler"])
    ]
    if topology.is_first:
        torch.save(
            {"updates": updates, "parameters": parameters, "scalers": scalers, "warm": model.scheduler.num_steps}, arguments["output"]
        )
    policy.shutdown()


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.weights()}


if __name__ == "__main__":
    main()

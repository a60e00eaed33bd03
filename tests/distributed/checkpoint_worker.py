"""Saves, or loads, a checkpoint under one layout after another, trains on, and writes what the state was (rank 0)."""

import json
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nft import objectives, policy
from megatron_nft.config import load
from megatron_nft.policy import files
from tests.support import made_up_groups, micro_batches_of


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    found = {case["name"]: run(case, arguments["config"], Path(arguments["directory"])) for case in arguments["cases"]}
    if dist.get_rank() == 0:
        torch.save(found, arguments["output"])
    policy.shutdown()


def run(case: dict, file: str, directory: Path) -> dict:
    config = load(file, [f"model.path={case['model']}", *case["overrides"]])
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology)
    _, (first, second) = micro_batches_of(model, made_up_groups()[topology.rank :: topology.world_size])
    model.copy_old_logprobs([*first, *second])
    step = partial(model.update, objective=partial(objectives.loss, settings=config.objective), names=["loss"])
    found: dict = {}
    if "load" in case:
        found["state"] = model.load(directory / case["load"])
    else:
        step(first)
    found["held"] = held(model)
    if "save" in case:
        found["saved"] = save_late(model, directory / case["save"], lambda: step(second), found, case.get("failing"))
    else:
        found["next"] = step(second)
    parallel_state.destroy_model_parallel()
    return found


def save_late(model: policy.Policy, directory: Path, train, found: dict, failing: int | None) -> str | None:
    """Start a save, train before its first byte is written, and return what went wrong with it, as this rank was told. failing: a rank
    whose disk is full."""
    plan, trained = files.plan_files, []

    def late(*arguments):
        while not trained:
            time.sleep(0.01)
        writer, metadata = plan(*arguments)
        if dist.get_rank() == failing:
            writer.write = mock.Mock(side_effect=OSError(28, "No space left on device", "a file"))
        return writer, metadata

    with mock.patch.object(files, "plan_files", late):
        model.start_save(directory, {"step": 1})
        found["next"] = train()
        trained.append(True)
        problem = model.finish_save(wait=True).problem
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    assert len(set(told)) == 1, told
    return problem


def held(model: policy.Policy) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, float32 weights and moments by Hugging Face name, put together from what every rank's optimizer holds."""
    kinds = ("param", "exp_avg", "exp_avg_sq")
    states: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    for one in model.optimizer.chained_optimizers:
        for ranges, buffer in zip(one.gbuf_ranges, one.buffers, strict=True):
            for parameter in buffer.param_index_map:
                states[parameter] = {kind: own_part(one, ranges, parameter, kind) for kind in kinds}
                for tensor in states[parameter].values():
                    dist.all_reduce(tensor, group=buffer.data_parallel_group)
    found = {"weight": {name: tensor.clone() for name, tensor in model.weights()}}
    for kind in kinds:
        of = partial(lambda parameter, kind: states[parameter][kind].view(parameter.shape), kind=kind)
        found[kind] = {name: tensor.clone() for name, tensor in model.gathered(of)}
    return found


def own_part(optimizer, ranges, parameter, kind: str) -> torch.Tensor:
    """[elements of the parameter]: what this rank's optimizer holds of it, zeros elsewhere."""
    whole = torch.zeros(parameter.numel())
    for buckets in ranges.values():
        for bucket in buckets:
            if parameter in bucket["param_map"]:
                at = bucket["param_map"][parameter]["param"]
                whole[at.start : at.end] = optimizer._get_main_param_and_optimizer_states(parameter)[kind]
    return whole


if __name__ == "__main__":
    main()

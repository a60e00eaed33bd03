"""Runs old log-probs and updates of a fixed rollout under one layout after another, and writes what came out (rank 0).

Between two layouts of a launch Megatron's groups are taken down and made anew over the same ranks.
"""

import dataclasses
import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_nft import batching, objectives, policy
from megatron_nft.checksums import Checksum, bit_sum, differing
from megatron_nft.config import load
from megatron_nft.packing import Packing
from megatron_nft.policy import exchange, optimizer, versions
from tests.support import made_up_groups, micro_batches_of


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    here = Path(arguments["output"]).parent
    found: dict = {"megatron": versions.version()}
    found |= {case["name"]: run(case, arguments["config"], here) for case in arguments["cases"]}
    if dist.get_rank() == 0:
        torch.save(found, arguments["output"])
    policy.shutdown()


def run(case: dict, file: str, here: Path) -> dict:
    """The case's losses, gradients and, in float32, parameters; keys as in `train`."""
    config = load(file, [f"model.path={case['model']}", *case["overrides"]])
    topology = policy.initialize(config.parallel, config.seed)
    with ExitStack() as stack:
        if case.get("padded"):  # one answer per micro-batch
            stack.enter_context(mock.patch.object(batching, "distribute", one_each))
        if case.get("float64"):  # Megatron's optimizer has no float64: gradients only
            config.model.precision = "fp64"
            stack.enter_context(mock.patch.object(optimizer, "wrap", wrap_float64))
            stack.enter_context(mock.patch.object(optimizer, "make", lambda *_: (NoOptimizer(), mock.Mock())))
        checkpoint = {key: here / case[key] for key in ("save", "load") if key in case}
        old = not case.get("float64") and not checkpoint
        groups = made_up_groups(**case.get("groups", {}))
        found = train(config, topology, groups, old, case.get("length_multiple"), **checkpoint)
    parallel_state.destroy_model_parallel()
    return found


def one_each(sizes, costs, replicas: int, budget: int, *_) -> Packing:
    """In place of batching.distribute: one item a micro-batch, dealt to the replicas."""
    each = -(-len(sizes) // replicas)
    bins = [[[i] if i < len(sizes) else [] for i in range(replica, replicas * each, replicas)] for replica in range(replicas)]
    return Packing(bins, budget, 0)


def train(config, topology, groups, old: bool, length_multiple: int | None, save: Path | None = None, load: Path | None = None) -> dict:
    """old: recompute the old log-probs, which are float32; otherwise the sampler's serve. length_multiple: as batching.Layout's. save,
    load: the state after the first update, which `load` leaves out."""
    model = policy.Policy(config, topology)
    if load:
        model.load(load)
    before, gradients = tensors(model.weights()), []
    reduce = model.module.config.finalize_model_grads_func

    def reduce_and_keep(chunks, *args, **kwargs) -> None:
        reduce(chunks, *args, **kwargs)
        gather_shards(chunks)
        gradients.append(tensors(model.gathered(lambda parameter: parameter.main_grad)))

    model.module.config.finalize_model_grads_func = reduce_and_keep
    sums = {frozenset([name]): Checksum(int(bit_sum(tensor)), str(tensor.dtype)) for name, tensor in before.items()}
    found_sums = policy.checksums(model)
    assert differing(sums, found_sums) == ([], before.keys()), "checksums of shards"
    settings = config.objective
    own = groups[topology.rank :: topology.world_size]  # as if its engine had sampled them
    plan, mini_batches = micro_batches_of(model, own, length_multiple=length_multiple)
    batches = [batch for mini in mini_batches for batch in mini]
    found = {"before": before, "gradients": gradients, "old": model.fill_old_logprobs(batches, settings)}
    found["logprobs"] = {}
    for part in everyones([pair for batch in batches for pair in old_logprobs(batch)] if topology.speaks else []):
        found["logprobs"] |= part
    if old:
        found["whole"] = policy.token_logprobs(model, [[*g.prompt.token_ids, *r.token_ids] for g in groups for r in g.responses])
    else:
        model.copy_old_logprobs(batches)
    objective = partial(loss, settings=settings)
    watch = policy.Watch(exchange.table(own)[0], 7, seed=1)
    found["updates"] = []
    for number, mini in enumerate(mini_batches):
        if not load or number > 0:
            found["updates"].append(model.update(mini, objective, objectives.METRICS, watch=watch))
        if save and number == 0:
            model.save(save, {"step": 1})
    found["pushes"] = [dataclasses.astuple(one) for one in watch.collect(topology)]
    found["after"] = tensors(model.weights())
    found["slots"] = [mini.slots for mini in plan.mini_batches]
    found["answers"] = everyones([sum(len(batch.answers) for batch in mini) for mini in mini_batches])
    return found


def everyones(value) -> list:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def loss(inputs, settings):
    """The objective, with every float of the batch in the precision of the log-probs."""
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return objectives.loss(
        type(inputs)(**{n: t.to(inputs.logprobs.dtype) if t.is_floating_point() else t for n, t in fields.items()}), settings
    )


def old_logprobs(batch) -> list[tuple[int, torch.Tensor]]:
    """Of each answer of the micro-batch, by its number."""
    return [(number, batch.old_logprobs[(batch.answer_index == i) & (batch.loss_mask == 1)]) for i, number in enumerate(batch.answers)]


def tensors(named) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named}


def gather_shards(chunks) -> None:
    """The distributed optimizer leaves each rank the sum of its own shard of the gradients; here every rank gets all of them."""
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            if not chunk.ddp_config.use_distributed_optimizer or dist.get_world_size(group) == 1:
                continue
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


class NoOptimizer:
    """Takes gradients as they are and does nothing with them."""

    param_groups = [{"lr": 0.0}]

    def zero_grad(self) -> None:
        pass

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def step(self) -> tuple[bool, float, int]:
        return True, 0.0, 0


def wrap_float64(module, config):
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=False, use_distributed_optimizer=False, overlap_grad_reduce=False)
    return DistributedDataParallel(module.config, settings, module)


if __name__ == "__main__":
    main()

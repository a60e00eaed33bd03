"""Updates of a fixed rollout, with the pass that makes old log-probs over all mini-batches or over those that need it, case after case;
and the one-pass form on this rank's rows of a head. Rank 0 writes what came out."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nft import objectives, policy
from megatron_nft.config import Config, load
from megatron_nft.policy import logprobs
from tests.support import made_up_groups, micro_batches_of


def run(config: Config, topology: policy.Topology, full: bool) -> dict:
    """full: pi_old of every mini-batch from a pass of its own, a micro-batch at a time. Otherwise as the trainer does it."""
    if full:
        config.train.logprob_tokens_per_micro_batch = None
    model = policy.Policy(config, topology)
    settings = config.objective
    _, mini_batches = micro_batches_of(model, made_up_groups()[topology.rank :: topology.world_size])
    batches, later = ([b for mini in part for b in mini] for part in (mini_batches, mini_batches[1:]))
    ours = config.train.old_logprobs == "recompute"
    totals = [model.fill_old_logprobs((batches if ours else mini_batches[0]) if full else later, settings)] if full or ours else []
    if not ours:
        model.copy_old_logprobs(batches)
    objective = partial(objectives.loss, settings=settings)
    updates = [model.update(mini, objective, objectives.METRICS, on_policy=not (full or n)) for n, mini in enumerate(mini_batches)]
    measured = objectives.summarize_measured(totals if full else [updates[0], *totals])
    updates = [{name: value for name, value in update.items() if name not in objectives.MEASURED} for update in updates]
    return {"updates": updates, "measured": measured, "after": {name: tensor.clone() for name, tensor in model.weights()}}


def one_pass(temperature: float) -> dict:
    """Loss, log-probs and gradients of the one-pass form, the gradients put together from all ranks; and the inputs, whole."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, generator=g) for n in (23, 40))
    targets = torch.randint(0, 37, (23,), generator=g)  # the rest of the 40 rows is padding
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    h, w = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
    head = logprobs.Head(w, 37, temperature, group)

    def loss_of(values, entropies, part):
        return (values.exp() * torch.arange(23)[part]).sum(), {"entropy": entropies.sum()}

    loss, metrics = logprobs.fused_loss(h, head, targets, loss_of, with_entropy=True, chunk=5)
    loss.backward()
    dist.all_reduce(h.grad)
    shards = [torch.empty_like(w) for _ in range(size)]
    dist.all_gather(shards, w.grad)
    found = {"loss": loss.detach(), "entropy": metrics["entropy"], "d_hidden": h.grad, "d_weight": torch.cat(shards)}
    return {"hidden": hidden, "weight": weight, "targets": targets, **found}


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    logprobs.CHUNK_BYTES = arguments["chunk_bytes"]
    found, topology = {}, None
    for name, overrides in arguments["cases"].items():
        config: Config = load(arguments["config"], [*arguments["overrides"], *overrides])
        topology = topology or policy.initialize(config.parallel, config.seed)
        found[name] = [run(config, topology, full) for full in (False, True)]
    found["one pass"] = one_pass(0.7)
    if topology.is_first:
        torch.save(found, arguments["output"])
    policy.shutdown()


if __name__ == "__main__":
    main()

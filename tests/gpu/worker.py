"""Log-probs and updates of a fixed rollout, and a journey of the state to the host and back, on this machine's device."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_nft import objectives, policy
from megatron_nft.config import load
from megatron_nft.policy import versions
from megatron_nft.policy.offload import LEVELS
from tests.support import made_up_groups, micro_batches_of


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    config = load(arguments["config"], arguments["overrides"])
    if arguments["local"]:  # as if Transformer Engine were not installed
        versions.have_transformer_engine = lambda: False
    policy.check(config, window=64)
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology)
    groups = made_up_groups()
    _, mini_batches = micro_batches_of(model, groups)
    batches = [b for mini in mini_batches for b in mini]
    model.fill_old_logprobs(batches, config.objective)
    old = {n: b.old_logprobs[(b.answer_index == i) & (b.loss_mask == 1)].cpu() for b in batches for i, n in enumerate(b.answers)}
    objective = partial(objectives.loss, settings=config.objective)
    updates = [model.update(mini, objective, objectives.METRICS) for mini in mini_batches]
    out = {"old": old, "updates": updates, "journey": journey(model), "kernels": policy.kernels(config)}
    torch.save(out, arguments["output"])
    policy.shutdown()


def journey(model: policy.Policy) -> dict[str, object]:
    """What left the device in bytes, and whether each kind of state is bit for bit what it was."""
    storages = {kind: list(model._offload._storages(kind)) for kind in ("parameters", "optimizer")}
    before = {kind: [bytes(s.cpu()) for s in found] for kind, found in storages.items()}
    occupied = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model._offload.leave(LEVELS["all"])
    left = sum(s.nbytes() for found in storages.values() for s in found)
    freed = occupied - torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model._come_back()
    same = {kind: [bytes(s.cpu()) for s in found] == before[kind] for kind, found in storages.items()}
    return {"left": left, "freed": freed, "bytes": sum(len(b) for found in before.values() for b in found), "same": same}


if __name__ == "__main__":
    main()

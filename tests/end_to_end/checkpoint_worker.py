"""One of two ranks: saves models as Megatron-LM's training does, and loads converted checkpoints under given layouts."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nft import policy
from megatron_nft.config import Config


def main() -> None:
    policy.start_distributed()
    from megatron.core import parallel_state

    for job in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        settings = Config(run_dir="")
        settings.model.path, settings.model.precision = job["source"], "bf16"
        for name, value in job["parallel"].items():
            setattr(settings.parallel, name, value)
        topology = policy.initialize(settings.parallel, seed=1)
        {"save": save, "load": load}[job["do"]](settings, topology, job)
        dist.barrier()
        parallel_state.destroy_model_parallel()  # the ranks stay
    policy.shutdown()


def save(settings: Config, topology: policy.Topology, job: dict) -> None:
    """iter_0000123 with the keys and the metadata of Megatron-LM's training."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    directory = Path(job["output"]) / "iter_0000123"
    if topology.is_first:
        directory.mkdir(parents=True)
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("123")
    dist.barrier()
    held = policy.Policy(settings, topology, trainable=job["optimizer"])
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, **job["metadata"]}
    model = held.module.sharded_state_dict(metadata=dict(metadata))
    state = {
        "args": Namespace(tensor_model_parallel_size=topology.tensor_size, padded_vocab_size=256),
        "checkpoint_version": 3.0,
        "iteration": 123,
        "model": model,
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (1, 1), (0, 0), replica_id=topology.rank),
        "num_floating_point_operations_so_far": 1.0,
    }
    if job["optimizer"]:
        state["optimizer"] = held.optimizer.sharded_state_dict(model, metadata=dict(metadata))
        state["opt_param_scheduler"] = held.scheduler.state_dict()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(directory), strategy, content_metadata=metadata)


def load(settings: Config, topology: policy.Topology, job: dict) -> None:
    """The weights that a policy of this layout has after loading a checkpoint."""
    held = policy.Policy(settings, topology, trainable=False, weights=False)
    held.load(Path(job["checkpoint"]))
    weights = {name: tensor.clone() for name, tensor in held.weights()}
    if topology.is_first:
        torch.save(weights, job["output"])


if __name__ == "__main__":
    main()

"""Makes Megatron's model, buffers and optimizer as every rank of some layouts would, one after another in this process, and writes how many
bytes each of them holds: argv is the cases' JSON file and the file to write.

torch's fake process group is any rank of any world: collectives come back at once and move nothing, which no allocation depends on.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_nft.config import Config
from megatron_nft.policy import cpu, model, optimizer, topology, versions
from megatron_nft.sizes import check_layout, check_ranks


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    dist.new_group = partial(_fake_group, dist.new_group)
    versions.quiet()
    cpu.adapt()
    found = {}
    for case in cases:
        config = configured(case["settings"])
        check_layout(case["hf"], config)
        check_ranks(config.parallel, case["ranks"])
        found[case["name"]] = [holds(config, case["hf"], rank, case["ranks"]) for rank in range(case["ranks"])]
    Path(sys.argv[2]).write_text(json.dumps(found))


def _fake_group(original, *arguments, backend=None, **named):
    """Megatron asks for gloo by name, too."""
    return original(*arguments, backend="fake", **named)


def configured(settings: dict[str, Any]) -> Config:
    """The defaults but for some settings, by their dotted keys."""
    config = Config(run_dir="unused")
    for key, value in settings.items():
        *path, name = key.split(".")
        setattr(reduce(getattr, path, config), name, value)
    return config


def holds(config: Config, hf: dict, rank: int, world: int) -> dict[str, int]:
    """Bytes of one rank, by kind."""
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    topology.make_groups(config.parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = [optimizer.wrap(module, config) for module in model.build(hf, config)]
    made, _ = optimizer.make(chunks, config)
    sizes = _sizes(chunks, made)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return sizes


def _sizes(chunks: list, made) -> dict[str, int]:
    """Of every storage, counted once: those of weights, of gradients, and what the optimizer has besides."""
    seen: set[int] = set()
    parameters = [parameter for chunk in chunks for parameter in chunk.module.parameters()]
    return {
        "weights": _bytes(parameters, seen),
        "gradients": _bytes((parameter.main_grad for parameter in parameters), seen),
        "optimizer": _bytes(_states(made), seen),
    }


def _states(made) -> Iterator[torch.Tensor]:
    for one in made.chained_optimizers:
        for group in one.optimizer.param_groups:
            yield from group["params"]
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    new = {key: nbytes for key, nbytes in storages.items() if key not in seen}
    seen.update(new)
    return sum(new.values())


if __name__ == "__main__":
    main()

"""Two engines of a dense model, of which one has nothing more to write after three steps: the other goes on without it."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import topology
from megatron_nft.rollout import Engine, Request


def main() -> None:
    model = json.loads(Path(sys.argv[1]).read_text())["model"]
    topology.start_distributed()
    engine = Engine(model, RolloutConfig(max_num_seqs=8, cpu_kvcache_space=1), 64, "fp32", seed=1)
    engine.add(0, Request((1, 2, 3), 1.0, 1.0, 20 if dist.get_rank() == 0 else 3, 7, ()))
    finished = [engine.step(alone=True) for _ in range(8)]
    assert [out is None for out in finished] == ([False] * 8 if dist.get_rank() == 0 else [False] * 3 + [True] * 5), finished
    assert engine.added(torch.ones(1)).item() == 2
    engine.withdraw([0])
    assert engine.step() is None  # asks the other one, too
    engine.close()
    topology.shutdown()


if __name__ == "__main__":
    main()

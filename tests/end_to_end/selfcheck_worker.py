"""Hands an engine wrong weights on purpose, and writes what the check says of each; on two ranks."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_nft import policy, rollout
from megatron_nft.config import Config
from megatron_nft.selfcheck import SelfCheck
from megatron_nft.trajectories import Prompt

SMALL = 1e-3  # relative: what an update does to a tensor


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    config = Config(run_dir="unused")
    config.model.path = given["model"]
    config.rollout.cpu_kvcache_space, config.rollout.max_num_seqs, config.rollout.check_sync_interval = 1, 16, 1
    config.parallel.tensor_model_parallel_size, config.rollout.tensor_parallel_size = given["tp"], given["tp"]
    topology = policy.initialize(config.parallel, config.seed)
    model = policy.Policy(config, topology, trainable=False)
    engine = rollout.Engine(config.model.path, config.rollout, 128, "fp32", config.seed)
    prompts = [Prompt(str(i), "", "", tuple((7 * i + 3 * j) % 101 for j in range(9 + i)), "test") for i in range(8)]
    check = SelfCheck(model, engine, prompts, config)
    said = {}
    for wrong in [None, *given["tampered"], None]:
        engine.sync(map(partial(Tampered, wrong if engine.index == given["engine"] else None), model.hand_over()), version=1)
        before = torch.get_rng_state()
        try:
            measured = check.after_sync(1)
            assert 0 < measured["sync_difference"] < 1e-5, measured
            said[str(wrong)] = "nothing"
        except RuntimeError as error:
            said[str(wrong)] = str(error)
        assert torch.equal(torch.get_rng_state(), before), "the check draws random numbers"
    Path(f"{given['output']}.{topology.rank}").write_text(json.dumps(said))
    engine.close()
    policy.shutdown()


class Tampered:
    """A bucket with one of its tensors changed."""

    def __init__(self, wrong: str | None, bucket):
        self._wrong, self._bucket = wrong, bucket

    def tensors(self):
        for name, tensor in self._bucket.tensors():
            yield name, tensor * (1 + SMALL) if name == self._wrong else tensor


if __name__ == "__main__":
    main()

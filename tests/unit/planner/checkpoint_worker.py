"""Saves a policy that has not trained yet, and prints the bytes of the tensors' files: argv is the model and the directory to write."""

import sys
from pathlib import Path

from megatron_nft import policy
from tests.unit.planner.holdings_worker import configured


def main() -> None:
    config = configured({"model.precision": "bf16", "model.path": sys.argv[1]})
    made = policy.Policy(config, policy.initialize(config.parallel, config.seed))
    made.save(Path(sys.argv[2]), {"step": 0})
    policy.shutdown()
    print(sum(file.stat().st_size for file in Path(sys.argv[2]).rglob("*.distcp")))


if __name__ == "__main__":
    main()

"""Moves made-up answers between ranks, case after case; every rank writes what it knew and what it received."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nft import batching, policy
from megatron_nft.config import ParallelConfig
from megatron_nft.policy import exchange
from tests.distributed.exchange_groups import groups_of_rank


def run(case: dict) -> dict:
    topology = policy.initialize(ParallelConfig(*case["parallel"]), seed=1)
    groups = groups_of_rank(case["groups"], case["n"], case["spread"], topology.rank, topology.world_size)
    answers, numbers = exchange.table(groups)
    layout = batching.Layout(topology.data_size, tokens_per_micro_batch=64, prompts_per_update=2)
    plan = batching.plan(answers, layout, lambda verdicts, penalties: 1 - verdicts + penalties, "token-mean", 1.0)
    received = exchange.exchange(groups, numbers, plan, topology)
    parallel_state.destroy_model_parallel()
    found = {"topology": topology, "table": answers, "positions": [g.position for g in groups], "numbers": numbers, "plan": plan}
    return found | {"received": received}


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    found = [run(case) for case in arguments["cases"]]
    torch.save(found, Path(arguments["output"]) / f"{dist.get_rank()}.pt")
    policy.shutdown()


if __name__ == "__main__":
    main()

"""Every answer reaches every rank of the replica that trains it, once, bit for bit, and no other rank."""

import struct

import numpy as np
import pytest
import torch

from megatron_nft.batching import Plan, TrainingAnswer
from tests.distributed.exchange_groups import all_groups
from tests.support import ROOT, run_ranks

N = 3
CASES = {
    "one rank": (1, (1, 1), 5, "turns"),
    "DP2": (2, (1, 1), 5, "turns"),
    "TP2": (2, (2, 1), 5, "turns"),
    "PP2, all from one rank": (2, (1, 2), 5, "last"),
    "DP4": (4, (1, 1), 7, "turns"),
    "TP2 DP2, engines of two ranks": (4, (2, 1), 7, "half"),
    "PP2 DP2": (4, (1, 2), 7, "turns"),
    "TP2 PP2, all from one rank": (4, (2, 2), 5, "last"),
    "DP4, fewer groups than ranks": (4, (1, 1), 1, "turns"),
    "DP2, nothing was kept": (2, (1, 1), 0, "turns"),
}


def bits(numbers: list[float]) -> bytes:
    return struct.pack(f"{len(numbers)}d", *numbers)


def expected_answers(count: int) -> list[TrainingAnswer]:
    """All answers in the order of the plan: by position, then by sample."""
    return [
        TrainingAnswer(list(g.prompt.token_ids), r.token_ids, r.logprobs, r.mask(), r.verdict.score)
        for g in all_groups(count, N)
        for r in g.responses
    ]


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request, tmp_path_factory) -> dict[str, list[dict]]:
    """What each rank knew and received in every case of so many ranks; they are started once."""
    names = [name for name, (ranks, *_) in CASES.items() if ranks == request.param]
    directory = tmp_path_factory.mktemp("exchange")
    cases = [{"parallel": p, "groups": count, "n": N, "spread": spread} for _, p, count, spread in (CASES[name] for name in names)]
    run_ranks(ROOT / "tests/distributed/exchange_worker.py", request.param, {"cases": cases, "output": str(directory)}, directory)
    by_rank = [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(request.param)]
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(names)}


def test_every_answer_arrives_once_where_it_is_trained(found):
    for case, ranks in found.items():
        check_case(case, ranks)


def check_case(case: str, found: list[dict]) -> None:
    ranks, parallel, count, _ = CASES[case]
    expected = expected_answers(count)
    data_size = ranks // (parallel[0] * parallel[1])
    assert {f["topology"].data_size for f in found} == {data_size}
    replicas = [f["topology"].data_rank for f in found]
    assert sorted(replicas) == sorted(list(range(data_size)) * (ranks // data_size))
    for rank, own in enumerate(found):
        assert own["topology"].replica_of_rank == tuple(replicas)
        check_table(own, found[0]["plan"], expected, count)
        mine = [a for mini in own["plan"].mini_batches for batch in mini.micro_batches[replicas[rank]] for a in batch]
        assert sorted(own["received"]) == sorted(mine), (case, rank)  # as many as are trained here, none else
        for number, answer in own["received"].items():
            assert answer == expected[number], (case, rank, number)
            assert bits(answer.logprobs) == bits(expected[number].logprobs) and bits([answer.verdict]) == bits([expected[number].verdict])
    one_of_each = [replicas.index(replica) for replica in range(data_size)]
    arrived = sorted(number for rank in one_of_each for number in found[rank]["received"])
    assert arrived == list(range(len(expected))), case


def check_table(own: dict, plan: Plan, expected: list[TrainingAnswer], count: int) -> None:
    """The table is the same on every rank, in order of position, whoever holds the groups."""
    table = own["table"]
    rows = [(len(a.prompt), len(a.response), sum(a.loss_mask), a.verdict) for a in expected]
    assert list(zip(table.prompt_lengths, table.response_lengths, table.loss_tokens, table.verdicts)) == rows
    groups = all_groups(count, N)
    assert table.penalties.tolist() == [r.penalty for g in groups for r in g.responses]
    assert table.groups.tolist() == [i for i, g in enumerate(groups) for _ in g.responses]
    first = {g.position: sum(len(earlier.responses) for earlier in groups[:i]) for i, g in enumerate(groups)}
    assert [first[position] for position in own["positions"]] == own["numbers"]
    assert own["plan"].mini_batches == plan.mini_batches
    assert np.array_equal(own["plan"].scales, plan.scales)
    assert np.array_equal(own["plan"].weights, plan.weights)

"""An evaluation whose ranks see other saved answers: the first rank's count, and it is the first rank that may refuse."""

import json
from pathlib import Path

from tests.support import run_ranks

WORKER = Path(__file__).with_name("evaluation_worker.py")


def test_the_first_rank_decides_for_all(tmp_path):
    """Rank 1 sees answers to three problems of six, rank 0 to one: five are answered, three answers each, and the numbers are right. While
    another process holds what rank 0 sees, both are refused."""
    run_ranks(WORKER, 2, {"folder": str(tmp_path), "answered": [[2], [0, 1, 3]]}, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["same"] for one in ranks] == [[True], [True]] and [one["asked"] for one in ranks] == [[9], [6]]
    assert all("is being written by another evaluation" in one["said"] for one in ranks)

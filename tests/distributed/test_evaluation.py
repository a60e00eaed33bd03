"""An evaluation whose ranks see other saved answers: the first rank's count, and it is the first rank that may refuse."""

import json
from pathlib import Path

from tests.support import run_ranks

WORKER = Path(__file__).with_name("evaluation_worker.py")


def run(folder: Path, answered: list[list[int]], in_use: bool = False) -> list[dict]:
    run_ranks(WORKER, 2, {"folder": str(folder), "answered": answered, "in_use": in_use}, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_first_ranks_answers_count_for_all(tmp_path):
    """Rank 1 sees answers to three problems of six, rank 0 to one: five are answered, three answers each, and the numbers are right."""
    ranks = run(tmp_path, [[2], [0, 1, 3]])
    assert [one["same"] for one in ranks] == [[True], [True]] and [one["asked"] for one in ranks] == [[9], [6]]


def test_all_ranks_are_refused_where_the_first_one_is(tmp_path):
    ranks = run(tmp_path, [[], []], in_use=True)
    assert all("is being written by another evaluation" in one["said"] and not one["asked"] for one in ranks)

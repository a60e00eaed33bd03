"""The real trainer, hung in a stage of a step: it ends and says where."""

from megatron_nft.watchdog import EXIT_CODE
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL, run


def test_a_run_that_hangs_in_a_stage_ends(tmp_path):
    """A limit of its own, well below what the other phases have; what was written before stays."""
    log, settings = tmp_path / "log", [*SMALL, "evaluation.sets=[]", "train.watchdog_phases={batching: 1}"]
    printed = run(
        "train", tmp_path / "run", *settings, log=log, at={"stage": "batching", "step": 1, "after": 0, "signal": "HANG"}, code=EXIT_CODE
    )
    report = printed[printed.index("megatron-nft: ") :]
    assert report.startswith("megatron-nft: rank 0: phase batching: no progress for 1 s\n")
    assert " in hang_here\n" in report and "trainer.py" in report
    assert (tmp_path / "run" / "stacks-rank0.txt").read_text() == report
    assert not runs.survivors(tmp_path / "run")

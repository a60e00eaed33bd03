"""A run trained again from its saved answers, without an engine, ends in the same weights."""

import os

import pytest
from safetensors.torch import load_file

from megatron_nft.rollout import read_coefficients, read_rollouts
from tests.end_to_end.runs import SMALL, differences, rows, run

# of the answers that were sampled, trained on or not
OF_ALL = {"train/response_length", "train/truncated_share", "train/sampled_tokens"}
UPDATES = {"train/loss", "train/grad_norm", "train/entropy", "train/mismatch_k3", "train/ratio_max", "train/clip_share_wrong",
           "train/negative_coefficient", "train/fill", "train/kept_correct_rate", "train/groups_kept", "train/lr"}  # fmt: skip


@pytest.fixture(scope="module")
def replayed(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replayed")
    printed = run("train", folder / "run", *SMALL, f"replay={small}", log=folder / "log")
    return folder / "run", printed


def test_the_same_weights_bit_for_bit(small, replayed):
    run_dir, printed = replayed
    got, wanted = (load_file(folder / "huggingface" / "model.safetensors") for folder in (run_dir, small))
    assert differences(got, wanted) == []
    mine, theirs = ([row for row in rows(folder) if row["step"]] for folder in (run_dir, small))
    assert len(mine) == len(theirs) == 5
    for got, wanted in zip(mine, theirs, strict=True):
        shared = {key for key in got if key.startswith("train/") and "outcome" not in key} - OF_ALL
        assert shared >= UPDATES and {key: got[key] for key in shared} == {key: wanted.get(key) for key in shared}
    assert all(row["tokens"] == row["train/sampled_tokens"] > 0 for row in mine)
    assert not any(key.startswith("validation/") for row in mine for key in row)
    for step in range(1, 6):
        assert read_coefficients(run_dir, step) == read_coefficients(small, step) != []
        assert read_rollouts(run_dir / f"rollouts/step_{step}.parquet") == read_rollouts(small / f"rollouts/step_{step}.parquet")


@pytest.mark.skipif(os.environ.get("MEGATRON_NFT_LONG") != "1", reason="20 seconds: make test-long")
def test_two_replicas_share_what_one_engine_wrote(small, replayed, tmp_path):
    """Losses and norms to 1e-4: sums in another order; the same answers, the same coefficients to 1e-3."""
    settings = [*SMALL, "train.steps=1", "checkpoint.export=false", f"replay={small}"]
    run("train", tmp_path / "run", *settings, log=tmp_path / "log", ranks=2)
    mine, theirs = rows(tmp_path / "run")[0], next(row for row in rows(replayed[0]) if row["step"] == 1)
    for key in ("loss", "grad_norm", "entropy", "negative_coefficient", "kept_correct_rate", "response_length", "groups_kept"):
        assert mine[f"train/{key}"] == pytest.approx(theirs[f"train/{key}"], rel=1e-4, abs=1e-5), key
    for one, other in zip(read_coefficients(tmp_path / "run", 1), read_coefficients(small, 1), strict=True):
        assert (one.position, one.sample) == (other.position, other.sample)
        assert one.coefficients == pytest.approx(other.coefficients, rel=1e-3, abs=1e-5)

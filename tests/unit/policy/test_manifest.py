"""Which checkpoint of a run directory is found, and which are kept; files only, no model."""

from pathlib import Path

import pytest

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import checkpoint, manifest


def write(run_dir: Path, step: int, complete: bool = True, **state) -> Path:
    directory = run_dir / "checkpoints" / f"step_{step}"
    directory.mkdir(parents=True)
    part = directory / "part.distcp"
    part.write_bytes(b"weights" * 10)
    if complete:
        files = {part.name: manifest.fingerprint(part)}
        state = {"command": "train", "step": step} | state
        content = {"layout": {}, "dtype": "float32", "optimizer": True, "files": files, "state": state}
        manifest.write(directory, content)
    return directory


def find(run_dir: Path, resume: bool = True) -> Path | None:
    return checkpoint.find(Config(run_dir=str(run_dir), resume=resume), "train")


def test_the_newest_complete_one_is_found(tmp_path):
    assert find(tmp_path) is None
    write(tmp_path, 9)
    ten = write(tmp_path, 10)
    write(tmp_path, 11, complete=False)  # killed while it was written
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert find(tmp_path) == ten


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_damaged_one_is_passed_over_with_a_word(harm, tmp_path, caplog):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    part = bad / "part.distcp"
    {"cut": lambda: part.write_bytes(b"weights"), "missing": part.unlink}[harm]()
    assert find(tmp_path) == good
    assert f"{bad} is damaged: part.distcp" in caplog.text


def test_a_changed_byte_shows_in_the_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK", 16)  # the file is several chunks long
    directory = write(tmp_path, 1)
    assert manifest.read_manifest(directory)["state"]["step"] == 1
    (directory / "part.distcp").write_bytes(b"weights" * 9 + b"weightz")
    assert find(tmp_path) == directory  # its sizes are right
    with pytest.raises(UserError, match="is damaged: part.distcp is not what was written"):
        manifest.read_manifest(directory)


def test_a_changed_bit_of_the_manifest_shows(tmp_path):
    """Everywhere: what is read is what was written, or it is refused."""
    directory = write(tmp_path, 1, score=0.1, text="ä")
    content = manifest.read_manifest(directory)
    manifest.write(directory, content)
    file = directory / manifest.MANIFEST
    written = file.read_bytes()
    refused = 0
    for place in range(len(written)):
        file.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        try:
            found = manifest.read_manifest(directory)
        except UserError:
            refused += 1
        else:
            assert {name: found[name] for name in content} == content, place
    assert refused > len(written) / 2


def test_what_to_do_with_a_damaged_one(tmp_path):
    """A converted one is made again; of a run's directory the newest one is named."""
    trained, converted = write(tmp_path, 1), write(tmp_path, 2, dtypes={})
    for directory, mend in (trained, "use an older checkpoint"), (converted, "convert the model again"):
        with pytest.raises(UserError, match=f"{tmp_path} is no complete checkpoint .*: name {converted}"):
            manifest.read_manifest(tmp_path)
        part = directory / "part.distcp"
        content = part.read_bytes()
        part.write_bytes(b"weights")
        with pytest.raises(UserError, match=f"part.distcp is not what was written: {mend}"):
            manifest.read_manifest(directory)
        part.write_bytes(content)
    (trained / manifest.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="no JSON .*: use an older checkpoint, or, of a converted model, convert it again"):
        manifest.read_manifest(trained)


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path):
    (write(tmp_path, 1) / "part.distcp").unlink()
    with pytest.raises(UserError, match="is damaged: part.distcp is missing"):
        find(tmp_path)


def test_without_resume_a_used_directory_is_refused(tmp_path):
    write(tmp_path, 1)
    assert find(tmp_path, resume=False) is None
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="already holds a run"):
        find(tmp_path, resume=False)


def test_a_run_of_another_command_is_refused(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(UserError, match="holds a run of `train`, not of `sft`"):
        checkpoint.find(Config(run_dir=str(tmp_path)), "sft")


def test_what_is_unfinished_is_never_kept_for_what_is_complete(tmp_path):
    for step, complete in ((10, True), (15, True), (20, False)):
        write(tmp_path, step, complete)
    checkpoint.prune(tmp_path, 1)
    assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["step_15"]


def test_the_newest_are_kept(tmp_path):
    for step in (2, 9, 10, 100):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert {d.name for d in (tmp_path / "checkpoints").iterdir()} == {"step_10", "step_100"}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1)])
def test_an_optimizer_stays_with_or_without_dealt_experts(before, after):
    with pytest.raises(UserError, match=f"expert_model_parallel_size {before}, and it is {after} now"):
        checkpoint.check_experts("step_1", {"expert": before}, {"expert": after})
    for saved, now in (({"expert": 2}, {"expert": 4}), ({}, {"expert": 1})):  # an old manifest tells nothing of experts
        checkpoint.check_experts("step_1", saved, now)


def kept(run_dir: Path) -> list[str]:
    return sorted(d.name for d in (run_dir / "checkpoints").iterdir())


def test_the_best_are_kept_besides_the_newest(tmp_path):
    """Of equals the newer; one without a score, or with one that is no number, is never best."""
    for step, score in ((1, 0.5), (2, 0.7), (3, 0.7), (4, None), (5, float("nan")), (6, 0.1)):
        write(tmp_path, step, **({} if score is None else {"score": score}))
    assert [d.name for d in checkpoint.best(tmp_path, 3)] == ["step_3", "step_2", "step_1"]
    checkpoint.prune(tmp_path, 1, keep_best=1)
    assert kept(tmp_path) == ["step_3", "step_6"]
    write(tmp_path, 7, score=0.6)
    checkpoint.prune(tmp_path, 1, keep_best=1)  # the score stands in the manifest: it outlives the process
    assert kept(tmp_path) == ["step_3", "step_7"]
    write(tmp_path, 8, score=0.8)
    checkpoint.prune(tmp_path, 1, keep_best=1)
    assert kept(tmp_path) == ["step_8"]


def test_without_any_score_the_newest_alone_are_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, 1, keep_best=2)
    assert kept(tmp_path) == ["step_3"]


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(tmp_path):
    write(tmp_path, 3)
    leftover = manifest.hidden(tmp_path / "checkpoints" / "step_4")
    leftover.mkdir()
    (leftover / manifest.MANIFEST).write_text("{}")  # killed before the last rename
    assert find(tmp_path) == tmp_path / "checkpoints" / "step_3"
    assert manifest.hidden(tmp_path / "checkpoints" / "step_4") != leftover  # another attempt never writes into it
    checkpoint.sweep(tmp_path)
    assert kept(tmp_path) == ["step_3"]


def test_a_damaged_one_counts_for_nothing(tmp_path):
    """Neither among the newest nor among the best, and a manifest that cannot be read ends no run."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_3" / "part.distcp").unlink()
    (tmp_path / "checkpoints" / "step_1" / manifest.MANIFEST).write_text("{")
    manifest.prune(tmp_path, 1, keep_best=1)
    assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_directories_without_a_manifest_are_not_overwritten(tmp_path):
    (write(tmp_path, 1) / manifest.MANIFEST).unlink()
    with pytest.raises(UserError, match="is no complete checkpoint"):
        find(tmp_path)

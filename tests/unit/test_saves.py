"""What a run does about its checkpoints: scores, failures, and what it says."""

from pathlib import Path
from unittest import mock

import pytest

from megatron_nft import saves
from megatron_nft.config import Config, EvaluationSetConfig
from megatron_nft.errors import UserError
from megatron_nft.policy import manifest
from megatron_nft.policy.saving import Saved

METRIC = "validation/heldout/avg@8"


class FakeModel:
    """Writes a manifest where a policy would write a checkpoint, unless the disk is full; a save ends when it is waited for."""

    def __init__(self):
        self.full, self.under_way = False, None

    def start_save(self, directory: Path, state: dict, then, more=None) -> None:
        assert self.under_way is None
        self.under_way = directory, state, then

    @property
    def saving(self) -> bool:
        return self.under_way is not None

    def finish_save(self, wait: bool) -> Saved | None:
        if self.under_way is None or not wait:
            return None
        (directory, state, then), self.under_way = self.under_way, None
        if not self.full:
            directory.mkdir(parents=True)
            content = {"layout": {}, "dtype": "float32", "optimizer": True, "files": {}, "state": state}
            manifest.write(directory, content)
            then()
        return Saved(directory, 0.01, 2.0, "No space left on device" if self.full else None)


def config(run_dir: Path, **settings) -> Config:
    made = Config(run_dir=str(run_dir))
    made.evaluation.sets = [EvaluationSetConfig(path="data/heldout.jsonl")]
    for name, value in settings.items():
        setattr(made.checkpoint, name, value)
    return made


def run_of(run_dir: Path, **settings) -> saves.Saves:
    return saves.Saves(FakeModel(), config(run_dir, **settings), mock.MagicMock(), is_first=True)


def kept(run_dir: Path) -> list[str]:
    return sorted(d.name for d in (run_dir / "checkpoints").iterdir())


def notes(run: saves.Saves) -> list[str]:
    return [call.args[0] for call in run.log.note.call_args_list]


def test_the_best_and_the_newest_are_kept_over_a_restart(tmp_path):
    for step, score in ((1, 0.5), (2, 0.7), (3, 0.6), (4, None)):
        run = run_of(tmp_path, keep=1, keep_best=1)  # a new process each time
        run.start({"step": step}, {METRIC: score, "validation/heldout/greedy": 0.1} if score else None)
        run.end()
    assert kept(tmp_path) == ["step_2", "step_4"]
    assert notes(run) == [f"step_4 saved in 2.0 s, of which the run waited 0.0 s; best: step_2, {METRIC} 70.0%"]


def test_it_is_written_while_the_run_goes_on(tmp_path):
    run = run_of(tmp_path)
    run.start({"step": 1})
    run.poll()
    assert not (tmp_path / "checkpoints").exists()
    run.start({"step": 2})  # waits for the one before
    assert kept(tmp_path) == ["step_1"]
    assert run.log.add.call_args.args[0] == {"time/checkpoint_write": 2.0}
    waiting = run_of(tmp_path / "other", async_save=False)
    waiting.start({"step": 1})
    assert kept(tmp_path / "other") == ["step_1"]


def test_a_failed_save_is_told_of_and_only_the_last_one_ends_the_run(tmp_path):
    run = run_of(tmp_path, keep=1)
    run.start({"step": 1})
    run.finish()
    run.model.full = True
    run.start({"step": 2})
    run.finish()
    assert notes(run)[-1] == "step_2 could not be saved, the run goes on without: No space left on device"
    assert kept(tmp_path) == ["step_1"]
    run.model.full = False
    run.start({"step": 3})
    run.end()
    assert kept(tmp_path) == ["step_3"]
    run.model.full = True
    run.start({"step": 4})
    with pytest.raises(UserError, match="step_4 could not be saved: No space left on device"):
        run.end()
    assert kept(tmp_path) == ["step_3"]


def test_which_metric_is_the_best_ones(tmp_path):
    given = config(tmp_path)
    assert saves.best_metric(given) == METRIC
    given.evaluation.k = 0
    assert saves.best_metric(given) == "validation/heldout/greedy"
    given.checkpoint.best_metric = "validation/other/greedy"
    assert saves.best_metric(given) == "validation/other/greedy"
    assert saves.best_metric(Config(run_dir="")) is None


def test_the_best_one_is_kept_by_default_where_all_are_validated(tmp_path):
    run = run_of(tmp_path, keep=1)
    for step, score in ((1, 0.5), (2, 0.75), (3, 0.25), (4, 0.5)):
        run.start({"step": step}, {METRIC: score})
    run.end()
    assert kept(tmp_path) == ["step_2", "step_4"]
    given = config(tmp_path)
    given.checkpoint.interval = 25
    saves.check(given)
    assert saves.best_kept(given) == saves.best_kept(Config(run_dir="")) == 0


def test_what_could_not_tell_the_best_is_refused(tmp_path):
    saves.check(Config(run_dir=""))
    given = config(tmp_path, keep_best=1)
    saves.check(given)
    given.checkpoint.interval = 25
    with pytest.raises(UserError, match="25. is no multiple of evaluation.interval .10"):
        saves.check(given)
    given = config(tmp_path, keep_best=1, best_metric="validation/heldout/avg@4")
    with pytest.raises(UserError, match=f"avg@4 is no metric of this run: use one of validation/heldout/greedy, {METRIC}"):
        saves.check(given)
    given = config(tmp_path, keep_best=1)
    given.evaluation.interval = 0
    with pytest.raises(UserError, match="there is no validation"):
        saves.check(given)

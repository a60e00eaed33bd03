"""A run directory that holds another run is refused; one that holds this run, on other nodes or for more steps, is not."""

import sys

import pytest

from megatron_nft.config import known_keys, load, save
from megatron_nft.errors import UserError
from megatron_nft.preflight import run_directory
from megatron_nft.preflight.run_directory import MAY_CHANGE, check_same_run, check_shared
from tests.support import ROOT

DEMO = ROOT / "examples/arithmetic/nft.yaml"


@pytest.fixture(scope="module")
def config_yaml(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("saved") / "config.yaml"
    save(load(DEMO), file)
    return file.read_text()


@pytest.fixture
def run_dir(tmp_path, config_yaml):
    """With the first row of a run, which has no checkpoint yet."""
    (tmp_path / "config.yaml").write_text(config_yaml)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path


ALLOWED = ["train.steps=99", "parallel.tensor_model_parallel_size=2", "logging.wandb=offline", "checkpoint.interval=7", "evaluation.k=1",
           "rollout.gpu_memory_utilization=0.5", "plan.nodes=3", "profile.steps=[1]", "train.watchdog_phases={start: 9}"]  # fmt: skip
REFUSED = {
    "optimizer.lr=0.5": "optimizer.lr was 0.0001 and is 0.5",
    "objective.name=dapo": "objective.name was 'nft' and is 'dapo'",
    "model.path=other": "model.path was 'examples/arithmetic/model' and is 'other'",
    "data.train=[{path: other.jsonl}]": "data.train was ",
    "rollout.n=3": "rollout.n was 8 and is 3",
    "megatron.transformer={layernorm_epsilon: 1}": "megatron.transformer was {} and is {'layernorm_epsilon': 1}",
    "seed=9": "seed was 1 and is 9",
}


def test_what_may_change(run_dir):
    assert check_same_run(load(DEMO, [f"run_dir={run_dir}", *ALLOWED]), False) == "begins anew, there is no checkpoint"


@pytest.mark.parametrize("change", REFUSED)
def test_what_may_not(run_dir, change):
    settings = load(DEMO, [f"run_dir={run_dir}", change])
    with pytest.raises(UserError) as refused:
        check_same_run(settings, False)
    assert str(refused.value).startswith(f"run_dir {run_dir} holds a run with other settings: ")
    assert REFUSED[change] in str(refused.value) and "choose another run_dir, or allow it with --changed" in str(refused.value)
    check_same_run(settings, True)


def test_many_changes_make_a_short_line(run_dir):
    changes = ["seed=9", "optimizer.lr=1", "rollout.n=3", "rollout.temperature=2", "train.prompts_per_update=8", "optimizer.clip_grad=2"]
    with pytest.raises(UserError, match="; and 2 more: give the settings it began with"):
        check_same_run(load(DEMO, [f"run_dir={run_dir}", *changes]), False)


def test_a_directory_without_a_run_is_new(tmp_path):
    assert check_same_run(load(DEMO, [f"run_dir={tmp_path}"]), False) == "new"
    save(load(DEMO, [f"run_dir={tmp_path}", "seed=5"]), tmp_path / "config.yaml")  # of a start that came to nothing
    assert check_same_run(load(DEMO, [f"run_dir={tmp_path}"]), False) == "new"


def test_settings_that_another_version_wrote_are_passed_over(run_dir):
    text = (run_dir / "config.yaml").read_text().replace("seed: 1\n", "seed_of_old: 3\n")
    (run_dir / "config.yaml").write_text(text)
    check_same_run(load(DEMO, [f"run_dir={run_dir}"]), False)


@pytest.mark.parametrize("text", ["seed: [1", "- seed", "", b"\xff\xfe\xff"])
def test_damaged_settings_are_told_of(run_dir, text):
    (run_dir / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="config.yaml is damaged: it holds no settings: start with --changed"):
        check_same_run(load(DEMO, [f"run_dir={run_dir}"]), False)
    check_same_run(load(DEMO, [f"run_dir={run_dir}"]), True)


def test_all_that_may_change_are_settings():
    sections = {".".join(key.split(".")[:depth]) for key in known_keys() for depth in (1, 2, 3)}
    assert set(MAY_CHANGE) <= sections


@pytest.fixture
def alone(monkeypatch):
    """One rank that hears of no others."""
    monkeypatch.delenv("RANK", raising=False)
    for module in (run_directory, sys.modules["megatron_nft.preflight.together"]):  # the package has a function of that name
        monkeypatch.setattr(module, "gather", lambda value: [value])


def test_a_shared_directory_is_left_as_it_was(alone, tmp_path):
    check_shared(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    check_shared(tmp_path)


@pytest.mark.parametrize("place", ["/proc/nope/x", "file/x/y"])
def test_a_directory_that_cannot_be_made_is_told_of(alone, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"\(rank 0\): /.* cannot be used \(.*\): see that it is there"):
        check_shared(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_removed_stays(alone, tmp_path, monkeypatch):
    """Another program's file in the directory, by then."""
    monkeypatch.setattr(run_directory, "_wait_for", lambda file, *_: (file.parent / "other").touch())
    check_shared(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]

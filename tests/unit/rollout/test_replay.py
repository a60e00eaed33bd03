"""Saved answers in a sampler's place: who has which, what is told of them, and what cannot be replayed."""

import shutil
from types import SimpleNamespace

import pytest

from megatron_nft.config import Config, save
from megatron_nft.errors import UserError
from megatron_nft.prompts import load_tokenizer
from megatron_nft.rollout import check_replay, check_resumed, rollout_path, write_rollouts
from megatron_nft.rollout.replay import Replay
from megatron_nft.trajectories import OUTCOMES
from tests.support import ROOT, made_up_groups

MODEL = ROOT / "examples/arithmetic/model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def config(tmp_path, tokenizer) -> Config:
    """A replay of two steps; the second was sampled by two engines."""
    made = Config(run_dir=str(tmp_path / "new"), replay=str(tmp_path / "run"))
    made.model.path, made.train.steps = str(MODEL), 2
    groups = made_up_groups(prompts=5, n=3)
    for group in groups:
        for response in group.responses:
            response.text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
    write_rollouts(rollout_path(made.replay, 1), 1, groups)
    for engine in range(2):
        write_rollouts(rollout_path(made.replay, 2, engine, 2), 2, groups[engine::2])
    save(made, tmp_path / "run" / "config.yaml")
    return made


def replayed(config: Config, step: int, world: int) -> list:
    """What each of `world` processes has of a step. What they tell each other is gathered in a first round."""
    told: list = []

    def one(rank: int, gathered):
        engine = SimpleNamespace(index=rank, count=world, gather=gathered)
        return Replay(engine, config).groups(step)

    for rank in range(world):
        one(rank, lambda value: told.append(value) or [value])
    return [one(rank, lambda _: told) for rank in range(world)]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_group_is_somewhere_once_whoever_wrote_it(config, step, world):
    parts, groups = replayed(config, step, world), made_up_groups(prompts=5, n=3)
    assert sorted(group.position for part in parts for group in part.groups) == list(range(5))
    assert all([g.position for g in part.groups] == sorted(g.position for g in part.groups) for part in parts)
    assert min(len(part.groups) for part in parts) > 0
    answers = [response for group in groups for response in group.responses]
    lengths = [len(response.token_ids) for response in answers]
    right = sum(response.verdict.score for response in answers)
    expected = {"kept_correct_rate": right / 15, "groups_kept": 5, "response_length": sum(lengths) / 15, "truncated_share": 0.0,
                "sampled_tokens": sum(lengths), **dict.fromkeys((f"outcome/{name}" for name in OUTCOMES), 0)}  # fmt: skip
    expected |= {"outcome/right": right, "outcome/wrong": 15 - right}
    for part in parts:
        assert part.statistics == pytest.approx(expected) and part.warnings == [] and part.reward_seconds == 0.0


def test_a_step_without_groups_is_told_of(config):
    write_rollouts(rollout_path(config.replay, 1), 1, [])
    [part] = replayed(config, 1, 1)
    assert part.groups == [] and part.statistics["groups_kept"] == 0 and "no update" in part.warnings[0]


def spoil(kind: str, config: Config, tmp_path) -> None:
    """Make a replay impossible."""
    run_dir = tmp_path / "run"
    if kind == "none":
        config.replay = str(tmp_path / "nowhere")
    elif kind == "no answers":
        shutil.rmtree(run_dir / "rollouts")
    elif kind == "itself":
        config.run_dir = f"{tmp_path}/new/../run"
    elif kind == "no step 1":
        rollout_path(run_dir, 1).unlink()
    elif kind == "no step 3":
        config.train.steps = 3
    elif kind == "half a step":
        rollout_path(run_dir, 2, 0, 2).unlink()
    elif kind == "temperature":
        config.rollout.temperature = 0.5
    elif kind == "model":
        config.model.path = str(tmp_path / "other")
    elif kind == "tokens":
        groups = made_up_groups()
        groups[0].responses[0].text = "something else"
        write_rollouts(rollout_path(run_dir, 1), 1, groups)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("none", "where no run has saved its answers"),
        ("no answers", "where no run has saved its answers"),
        ("itself", "replay and run_dir are both"),
        ("no step 1", "no answers of step 1 of 2: restore"),
        ("no step 3", "no answers of step 3 of 3: set train.steps=2"),
        ("half a step", "no answers of step 2 of 2: set train.steps=1"),
        ("temperature", "sampled at temperature 1.0, rollout.temperature is 0.5: set rollout.temperature=1.0"),
        ("model", "is of the model .*arithmetic/model, model.path is .*other"),
        ("tokens", "not those of the tokenizer"),
    ],
)
def test_what_cannot_be_replayed(kind, said, config, tmp_path, tokenizer):
    check_replay(config, tokenizer)
    spoil(kind, config, tmp_path)
    with pytest.raises(UserError, match=said):
        check_replay(config, tokenizer)


def test_a_replay_goes_on_as_a_replay(config):
    check_resumed(config, Replay(SimpleNamespace(), config).state_dict())
    with pytest.raises(UserError, match="holds a run that sampled its answers: leave replay out"):
        check_resumed(config, {"share": [1, 3]})
    config.replay = None
    with pytest.raises(UserError, match="holds a replay: set replay"):
        check_resumed(config, {"replay": True})


def test_a_model_that_has_moved_is_the_same_model(config, tmp_path, tokenizer):
    shutil.copytree(MODEL, tmp_path / "moved")
    config.model.path = str(tmp_path / "moved")
    check_replay(config, tokenizer)

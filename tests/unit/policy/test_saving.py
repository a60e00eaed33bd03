"""Checkpoints of a tiny policy on one rank: what is written, what a full disk leaves, and what loading refuses."""

import errno
import json
import os
import pickle
import resource
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_nft import policy
from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import checkpoint, files, manifest, saving
from megatron_nft.policy.versions import PICKLED_EXTRA_STATE
from tests.support import tiny_model

EXP_AVG = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def topology():
    yield policy.initialize(Config(run_dir="").parallel, seed=1)
    policy.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory, topology) -> policy.Policy:
    config = Config(run_dir="unused")
    config.model.path, config.model.precision = str(tiny_model(tmp_path_factory.mktemp("model"))), "fp32"
    return policy.Policy(config, topology)


def fill(model: policy.Policy, value: float) -> None:
    """Weights, master weights and moments that tell one state from another."""
    [adam] = model.optimizer.chained_optimizers
    for number, group in enumerate(adam.optimizer.param_groups):
        group["step"] = int(value)
        for main in group["params"]:
            main.data.fill_(value + number)
            for offset, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
                adam.optimizer.state[main][name].fill_(value + offset / 4)
    for parameter in model.module.parameters():
        parameter.data.fill_(value)


def values(model: policy.Policy) -> list[float]:
    """Of every weight, master weight and moment, and of the steps."""
    [adam] = model.optimizer.chained_optimizers
    mains = [main for group in adam.optimizer.param_groups for main in group["params"]]
    moments = [t for main in mains for t in adam.optimizer.state[main].values() if torch.is_tensor(t)]
    tensors = [*model.module.parameters(), *mains, *moments]
    found = {float(x) for t in tensors for x in t.detach().unique()}
    return sorted(found | {float(group["step"]) for group in adam.optimizer.param_groups})


def weights(model: policy.Policy) -> set[float]:
    return {float(x) for parameter in model.module.parameters() for x in parameter.detach().unique()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_what_is_written_is_what_was_when_it_started(model, tmp_path):
    """Training goes on in place before the first byte is written."""
    gate, plan = threading.Event(), files.plan_files

    def late(*arguments):
        gate.wait(60)
        return plan(*arguments)

    fill(model, 1.0)
    with mock.patch.object(files, "plan_files", late):
        model.start_save(tmp_path / "step_1", {"step": 1})
        assert model.finish_save(wait=False) is None  # it cannot have ended
        assert not (tmp_path / "step_1").exists()
        with pytest.raises(RuntimeError, match="finish it first"):
            model.start_save(tmp_path / "step_2", {})
        fill(model, 7.0)
        model.scheduler.step(increment=5)
        gate.set()
        saved = model.finish_save(wait=True)
    assert saved.problem is None and saved.stalled > 0 and saved.seconds > 0
    assert model.finish_save(wait=True) is None
    assert names(tmp_path) == ["step_1"]
    assert model.load(tmp_path / "step_1") == {"step": 1}
    assert values(model) == [1.0, 1.25, 1.5]
    assert model.scheduler.num_steps == 0
    alone = policy.Policy(model.config, model.topology, trainable=False)  # the optimizer would put its own weights over the file's
    alone.load(tmp_path / "step_1")
    assert weights(alone) == {1.0}


def test_the_manifest_tells_of_every_file(model, tmp_path):
    model.save(tmp_path / "step_1", {"step": 1, "score": 0.5})
    content = manifest.read_manifest(tmp_path / "step_1")
    there = {str(f.relative_to(tmp_path / "step_1")) for f in (tmp_path / "step_1").rglob("*") if f.is_file()}
    assert content["files"].keys() == there - {manifest.MANIFEST}
    assert all(checksum is not None for _, checksum in content["files"].values())
    assert (content["dtype"], content["optimizer"], content["state"]) == ("float32", True, {"step": 1, "score": 0.5})
    assert checkpoint.score_of(tmp_path / "step_1") == 0.5


def test_a_directory_of_the_name_is_replaced(model, tmp_path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "old").write_text("")
    model.save(tmp_path / "step_1", {})
    assert names(tmp_path) == ["step_1"] and "old" not in names(tmp_path / "step_1")


def test_a_full_disk_leaves_the_last_good_one(model, tmp_path):
    model.save(tmp_path / "step_1", {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the file of tensors is longer
    try:
        model.start_save(tmp_path / "step_2", {"step": 2})
        saved = model.finish_save(wait=True)
        with pytest.raises(UserError, match="step_3 could not be saved: File too large") as error:
            model.save(tmp_path / "step_3", {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.problem.startswith("File too large") and "\n" not in str(error.value)
    assert names(tmp_path) == ["step_1"]
    assert model.load(tmp_path / "step_1") == {"step": 1}
    model.save(tmp_path / "step_4", {"step": 4})  # the next one finds room


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (saving.manifest, "hidden"),
        (saving, "copy_companions"),
        (files, "write_common"),
        (files, "write_index"),
        (saving.manifest, "publish"),
    ],
    ids=["directory", "companions", "common part", "index", "manifest"],
)
def test_no_space_at_any_moment(where, what, model, tmp_path):
    model.save(tmp_path / "step_1", {"step": 1})
    if what == "write_common" and "common.pt" not in names(tmp_path / "step_1"):
        pytest.skip("this Megatron-Core keeps the common part among the tensors")
    with mock.patch.object(where, what, side_effect=OSError(errno.ENOSPC, "No space left on device", "some file")):
        model.start_save(tmp_path / "step_2", {"step": 2})
        saved = model.finish_save(wait=True)
    assert saved.problem == "No space left on device (some file)"
    assert names(tmp_path) == ["step_1"]


def test_a_fault_of_the_program_is_raised(model, tmp_path):
    for where, what in ((files, "plan_files"), (files, "write_index")):
        with mock.patch.object(where, what, side_effect=KeyError("a mistake")):
            model.start_save(tmp_path / "step_1", {})
            with pytest.raises(KeyError, match="a mistake"):
                model.finish_save(wait=True)


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="step_1 could not be saved: Not a directory"):
        model.save(tmp_path / "file" / "step_1", {})


# ---- loading


def state_without(*path):
    """sharded_state, less one entry."""
    whole = checkpoint.sharded_state

    def less(*arguments, **settings):
        state = at = whole(*arguments, **settings)
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return state

    return mock.patch.object(checkpoint, "sharded_state", less)


GROUP = ("optimizer", "optimizer", "param_groups")
LACKING = {
    "scheduler": (("scheduler",), "scheduler."),
    "updates of the schedule": (("scheduler", "num_steps"), "scheduler.num_steps"),
    "step of Adam": ((*GROUP, 0, "step"), r"optimizer.optimizer.param_groups.0.step"),
    "a parameter group": ((*GROUP, 0), r"optimizer.optimizer.param_groups.0"),
    "generators": (("rng",), "rng/shard_0_1"),
    "a weight": (("model", "decoder.final_layernorm.weight"), "decoder.final_layernorm.weight"),
    "moments": (("optimizer", "param_state", 0), "optimizer.state.exp_avg."),
}


@pytest.mark.parametrize(("path", "named"), LACKING.values(), ids=LACKING)
def test_an_entry_that_is_not_filled(path, named, model, tmp_path):
    with state_without(*path):
        model.save(tmp_path / "step_1", {})
    with pytest.raises(UserError, match=f"step_1 lacks {named}"):
        model.load(tmp_path / "step_1")


def test_an_entry_that_the_model_has_no_place_for(model, tmp_path):
    model.save(tmp_path / "step_1", {})
    with state_without("model", "decoder.final_layernorm.weight"), pytest.raises(UserError, match="holds decoder.final_layernorm.weight"):
        model.load(tmp_path / "step_1")


def test_extra_states_of_one_kind_of_layers_are_not_asked_of_another(model, tmp_path, monkeypatch):
    """A checkpoint of Megatron's own layers, loaded into layers that keep a state besides their tensors, as Transformer Engine's do; and
    one that has it, with leave to take it."""
    norm, taken = type(model.module.decoder.final_layernorm), []
    model.save(tmp_path / "without", {})
    before = model.module.decoder.final_layernorm.weight.detach().clone()

    def take(self, state):
        taken.append((state if state is None else state.tolist(), os.environ.get(PICKLED_EXTRA_STATE)))

    monkeypatch.setattr(norm, "get_extra_state", lambda self: torch.tensor([7], dtype=torch.uint8), raising=False)
    monkeypatch.setattr(norm, "set_extra_state", take, raising=False)
    monkeypatch.delenv(PICKLED_EXTRA_STATE, raising=False)
    with torch.no_grad():
        model.module.decoder.final_layernorm.weight.zero_()
    model.load(tmp_path / "without")
    assert torch.equal(model.module.decoder.final_layernorm.weight, before)
    assert taken and all(state is None for state, _ in taken)
    model.save(tmp_path / "with", {})
    taken.clear()
    model.load(tmp_path / "with")
    assert ([7], "1") in taken and PICKLED_EXTRA_STATE not in os.environ


def rewrite(directory: Path, index) -> None:
    """Put another index into a checkpoint, and its checksum into the manifest."""
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    content = json.loads((directory / manifest.MANIFEST).read_text())
    content["files"][".metadata"] = manifest.fingerprint(directory / ".metadata")
    manifest.write(directory, content)


def test_a_key_taken_out_of_the_index(model, tmp_path):
    model.save(tmp_path / "step_1", {})
    index = pickle.loads((tmp_path / "step_1" / ".metadata").read_bytes())
    del index.state_dict_metadata[EXP_AVG]
    rewrite(tmp_path / "step_1", index)
    with pytest.raises(UserError, match=f"step_1 lacks {EXP_AVG}"):
        model.load(tmp_path / "step_1")


def test_a_generator_of_which_a_part_is_missing(model, tmp_path):
    model.save(tmp_path / "step_1", {})
    whole = checkpoint._rng_object

    def more(topology):
        made = whole(topology)
        made.data["another"] = 1
        return made

    with mock.patch.object(checkpoint, "_rng_object", more), pytest.raises(UserError, match="step_1 lacks rng.another"):
        model.load(tmp_path / "step_1")


def test_the_newest_whole_one_is_loaded(model, tmp_path, caplog):
    at = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        fill(model, float(step))
        model.save(at / f"step_{step}", {"step": step})
    for step in (3, 2):
        part = at / f"step_{step}" / "__0_0.distcp"
        part.write_bytes(part.read_bytes()[:-1] + b"?")
        assert checkpoint.newest(tmp_path) == at / "step_3"  # by the sizes
        assert model.load_newest(at / "step_3") == (at / f"step_{step - 1}", {"step": step - 1})
        assert f"step_{step} is damaged: __0_0.distcp is not what was written" in caplog.text
        assert values(model)[0] == step - 1
    (at / "step_1" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="step_3 is damaged"):
        model.load_newest(at / "step_3")


def test_weights_alone_are_no_place_to_go_on_from(model, tmp_path):
    alone = policy.Policy(model.config, model.topology, trainable=False)
    alone.save(tmp_path / "weights", {})
    with pytest.raises(UserError, match="holds weights without an optimizer"):
        model.load(tmp_path / "weights")
    fill(model, 3.0)
    model.save(tmp_path / "step_1", {"step": 1})
    assert alone.load(tmp_path / "step_1") == {"step": 1}
    assert weights(alone) == {3.0}

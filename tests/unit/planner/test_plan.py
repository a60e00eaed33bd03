"""A plan: what it is made of, what does not fit, checkpoints and disk."""

import json

import pytest

from megatron_nft import config
from megatron_nft.config import load
from megatron_nft.errors import UserError
from megatron_nft.planner import models, tables
from megatron_nft.planner.models import find
from megatron_nft.planner.parameters import total
from megatron_nft.planner.plan import plan

QWEN_32B = 32_763_876_352  # of the model's safetensors index: total_size / 2


@pytest.mark.parametrize(
    "name, parameters", [("Qwen2.5-32B", QWEN_32B), ("Qwen2.5-1.5B", 1_543_714_304), ("Qwen2.5-Math-7B", 7_615_616_512)]
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    assert total(find(f"anywhere/{name}").hf) == parameters


def test_a_model_on_this_machine_is_read_and_not_looked_up(tmp_path):
    own = find("Qwen2.5-1.5B").hf | {"num_hidden_layers": 2}
    (tmp_path / "Qwen2.5-1.5B").mkdir()
    (tmp_path / "Qwen2.5-1.5B" / "config.json").write_text(json.dumps(own))
    found = find(str(tmp_path / "Qwen2.5-1.5B"))
    assert found.hf["num_hidden_layers"] == 2 and "published" not in found.told


def test_a_directory_without_config_is_not_replaced_by_a_published_one(tmp_path):
    (tmp_path / "Qwen2.5-32B").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        find(str(tmp_path / "Qwen2.5-32B"))
    assert "Qwen2.5-32B" in find(str(tmp_path / "none" / "Qwen2.5-32B")).told


def test_plan_holds_cluster_layout_and_both_models(planned):
    found = planned("parallel.pipeline_model_parallel_size=2")
    assert (found.layout.tp, found.layout.pp, found.layout.dp, found.cluster.engines) == (8, 2, 8, 32)
    assert found.fits and not found.reasons
    assert found.as_dict()["memory"]["headroom"]["train"] == found.memory.limit - sum(found.memory.phases["train"].values())
    json.dumps(found.as_dict())


def test_what_does_not_fit_is_told_with_the_phase_and_the_bytes(planned):
    found = planned("train.tokens_per_micro_batch=65536")
    over = sum(found.memory.phases["train"].values()) - found.memory.limit
    assert not found.fits
    assert found.reasons[0].startswith("train needs ") and found.reasons[0].endswith(f"{over / 2**30:.1f} too many")


def test_a_cache_that_cannot_hold_one_answer_does_not_fit(planned):
    found = planned("rollout.tensor_parallel_size=1", "rollout.gpu_memory_utilization=0.78")
    assert found.memory.kv_tokens < 16384
    assert any("KV cache" in reason for reason in found.reasons)


def test_checkpoints_of_the_whole_run(planned):
    found = planned("checkpoint.interval=20", "checkpoint.keep=2", "checkpoint.keep_best=1", "train.steps=320").saves
    assert found.checkpoint == 14 * QWEN_32B  # bf16 weights; float32 weights and two moments
    assert (found.count, found.kept, found.files) == (16, 3, 8)
    assert found.largest_file * 8 >= found.checkpoint
    assert found.export == 2 * QWEN_32B
    assert found.disk == 4 * found.checkpoint + found.answers + found.export  # while the fourth is being written
    assert found.stall == 2  # the fake's


@pytest.mark.parametrize("precision, weight", [("auto", 2), ("fp16", 2), ("fp32", 4)])
def test_a_checkpoint_has_the_same_size_wherever_it_is_told(hf, precision, weight):
    """Weights as they are trained and the optimizer's state in float32, whatever it is held in, with the rows that pad the vocabulary."""
    own = config.Config()
    own.plan.nodes, own.model.precision, own.parallel.tensor_model_parallel_size, own.train.steps = 16, precision, 8, 40
    own.optimizer.use_precision_aware_optimizer, own.optimizer.exp_avg_dtype, own.optimizer.exp_avg_sq_dtype = True, "bf16", "bf16"
    found = plan(own, hf | {"vocab_size": 152_063})
    assert found.saves.checkpoint == (weight + 12) * QWEN_32B == found.memory.facts["checkpoint bytes"]
    assert found.saves.export == weight * (QWEN_32B - 2 * 5120)
    assert found.saves.disk == found.saves.checkpoint + found.saves.answers + found.saves.export  # one save, at the end
    assert not any("disk" in name for name in (found.memory.facts | found.times.facts))


def test_a_run_that_ends_by_its_tokens_has_fewer_steps_and_saves(hf):
    own = config.Config()
    own.plan.nodes, own.parallel.tensor_model_parallel_size, own.rollout.tensor_parallel_size = 16, 8, 4
    own.checkpoint.interval, own.checkpoint.keep = 1, 9
    own.train.steps = 100
    whole = plan(own, hf)
    own.train.sampled_tokens = int(2.5 * whole.times.facts["sampled tokens"])
    found = plan(own, hf)
    assert (found.times.steps, found.saves.count, found.saves.kept) == (3, 3, 3)
    assert found.saves.answers == pytest.approx(3 / 100 * whole.saves.answers)
    assert "; 3 steps: " in tables.rates(found)


def test_a_short_run_keeps_no_more_checkpoints_than_it_makes(planned):
    found = planned("train.steps=30", "checkpoint.interval=0").saves
    assert (found.count, found.kept) == (1, 1) and found.disk == found.checkpoint + found.answers + found.export


BAD = {
    "plan.nodes=null": "plan.nodes=16",
    **{
        f"plan.{name}={value}": f"plan.{name} is {value}: use a number from "
        for name, values in {
            "mixed_share": ("1.5", "nan", "0.0", "-0.1"),
            "response_length_sigma": ("nan", "inf", "-1.0", "1000000000.0"),
            "mean_response_length": ("-4", "0", "1000000000"),
            "mean_prompt_length": ("0", "1000000000"),
            "nodes": ("0", "-1"),
            "gpus_per_node": ("0", "-8"),
        }.items()
        for value in values
    },
    "plan.gpu=V100": "H100, H200",
    "plan.gpu=H1000": "did you mean H100?",
    "plan.nodes=3": "cannot be divided by TP x PP x CP (8 x 1 x 5)",
    "plan.gpus_per_node=6": "would stand on two nodes",
    "model.path=nowhere/at-all": "qwen2.5-32b",
    "data.max_prompt_length=200000": "more than the model's window (131072)",
    "train.tokens_per_micro_batch=8192": "is less than data.max_prompt_length + rollout.max_tokens (16384)",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_line(file, override):
    more = ["parallel.context_parallel_size=5"] if override == "plan.nodes=3" else []
    with pytest.raises(UserError) as error:
        plan(load(file, [override, *more]))
    assert BAD[override] in str(error.value)


def test_every_published_file_is_a_model(tmp_path):
    for name in models.published():
        assert total(find(f"x/{name}").hf) > 1e9
    assert config.load

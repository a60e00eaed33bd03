"""What is refused, in one line with the mend."""

import math
from functools import reduce

import pytest

from megatron_nft.config import Config, CorrectionConfig, ObjectiveConfig, check
from megatron_nft.errors import UserError

NAMES = {
    "model.precision": (["auto", "bf16", "fp16", "fp32"], "fp8"),
    "model.fp8": ([None], "e5m2"),
    "model.fp8_recipe": (["tensorwise", "delayed", "blockwise", "mxfp8"], "rowwise"),
    "objective.ratio": (["token", "sequence", "geometric"], "word"),
    "objective.reduction": (["constant", "token-mean", "sequence-mean"], "mean"),
    "objective.correction.method": (["none", "truncate", "mask"], "clip"),
    "objective.correction.level": (["token", "sequence", "geometric"], "word"),
    "reward.truncated": (["wrong", "mask", "drop"], "keep"),
    "train.old_logprobs": (["recompute", "rollout"], "none"),
    "train.offload": ([None, "none", "gradients", "optimizer", "all"], "params"),
    "train.recompute_granularity": ([None, "full", "selective"], "layers"),
    "logging.wandb": (["disabled", "offline", "online"], "on"),
    "rollout.unfinished": (["resume", "drop"], "keep"),
    "rollout.mode": (["colocated", "served"], "remote"),
    "rollout.served.update": (["keep", "abort", "wait"], "go on"),
}
LEASTS = {
    "objective.neg_weight": 0.0, "train.sampled_tokens": 1, "optimizer.lr": 0.0, "optimizer.weight_decay": 0.0, "rollout.temperature": 1e-3,
    "train.steps": 0, "reward.time_limit": 1, "evaluation.k": 0,
    "parallel.tensor_model_parallel_size": 1, "parallel.pipeline_model_parallel_size": 1, "rollout.max_tokens": 1,
    "rollout.max_staleness": 0, "train.watchdog_timeout": 0, "rollout.tensor_parallel_size": 1, "reward.workers": 1,
    "train.tokens_per_micro_batch": 1, "data.max_prompt_length": 1, "objective.reduction_constant": 1, "checkpoint.keep": 1,
    "sft.sequences_per_update": 1,
}  # fmt: skip


def changed(key: str, value) -> Config:
    config = Config()
    *parts, name = key.split(".")
    at = config
    for part in parts:
        at = getattr(at, part)
    assert hasattr(at, name)
    setattr(at, name, value)
    return config


def refused(config: Config) -> UserError:
    with pytest.raises(UserError) as caught:
        check(config)
    return caught.value


def test_the_defaults_are_right():
    check(Config())


@pytest.mark.parametrize("key", NAMES)
def test_names(key):
    good, bad = NAMES[key]
    for value in good:
        check(changed(key, value))
    error = refused(changed(key, bad))
    assert error.problem == f"{key} is {bad!r}" and all(str(value) in error.mend for value in good)


@pytest.mark.parametrize("key", LEASTS)
def test_least_values(key):
    least = LEASTS[key]
    check(changed(key, least))
    below = math.nextafter(least, -1) if isinstance(least, float) else least - 1
    assert refused(changed(key, below)).problem == f"{key} is {below}"
    assert key in refused(changed(key, math.nan)).problem


def test_no_update_without_a_prompt():
    """prompts_per_step and prompts_per_update of 0 would divide by zero; they are refused by name, not by arithmetic."""
    for key in ("rollout.prompts_per_step", "train.prompts_per_update"):
        assert refused(changed(key, 0)).problem == f"{key} is 0"


def one_line(**changes) -> UserError:
    """The error that the defaults with these changes (dots as double underscores) give."""
    config = Config()
    objective = {key.removeprefix("objective__"): changes.pop(key) for key in [*changes] if key.startswith("objective__")}
    config.objective = ObjectiveConfig(**objective)
    for key, value in changes.items():
        *parts, name = key.split("__")
        setattr(reduce(getattr, parts, config), name, value)
    error = refused(config)
    assert "\n" not in str(error)
    return error


def test_a_name_that_is_no_objective():
    assert "objective.name is 'grppo'" in (error := one_line(objective__name="grppo")).problem and "grpo" in error.mend


@pytest.mark.parametrize("name, good, bad", [("nft", [0, 1, 2, "maxrl"], 3), ("rft", [0, 1, 2, "maxrl"], "x"), ("grpo", [1, 2], 0)])
def test_normalize_by_objective(name, good, bad):
    for value in good:
        check(changed("objective", ObjectiveConfig(name=name, normalize=value)))
    assert "objective.normalize" in one_line(objective__name=name, objective__normalize=bad).problem


@pytest.mark.parametrize(
    "name, key, value",
    [("nft", "clip_ratio_low", 0.2), ("grpo", "eps", 1.0), ("dapo", "neg_weight", 1.0), ("topr", "clip_ratio_high", 1.0)],
)
def test_a_setting_that_the_objective_does_not_have(name, key, value):
    """It would have no effect, in silence."""
    error = one_line(objective__name=name, **{f"objective__{key}": value})
    assert f"objective.{key}" in error.problem and name in error.problem


@pytest.mark.parametrize("value", [-0.5, -2.0, math.nan, math.inf])
def test_neg_weight_is_no_negative_but_the_authors(value):
    assert "objective.neg_weight" in one_line(objective__neg_weight=value).problem
    assert ObjectiveConfig(neg_weight=-1).name == "dapo"


def test_rft_has_no_negative_term():
    assert "neg_weight" in one_line(objective__name="rft", objective__neg_weight=1.0).problem


@pytest.mark.parametrize("name", ["nft", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "topr"])
def test_one_answer_a_prompt_with_an_objective_that_compares(name):
    error = one_line(objective__name=name, rollout__n=1, rollout__dynamic_sampling=False)
    assert "rollout.n is 1" in error.problem and name in error.problem


def test_one_answer_a_prompt_is_right_for_rft_without_a_filter():
    config = changed("objective", ObjectiveConfig(name="rft"))
    config.rollout.n = 1
    assert "dynamic_sampling" in refused(config).problem
    config.rollout.dynamic_sampling = False
    check(config)


def test_a_ratio_of_answers_has_no_correction_of_tokens():
    token, sequence = CorrectionConfig("truncate"), CorrectionConfig("truncate", level="sequence")
    for ratio in ("sequence", "geometric"):
        error = one_line(objective__ratio=ratio, objective__correction=token)
        assert "objective.ratio" in error.problem and "objective.correction.level" in error.problem
        check(changed("objective", ObjectiveConfig(ratio=ratio, correction=sequence)))


def test_nothing_to_correct_where_the_sampler_is_pi_old():
    error = one_line(objective__correction=CorrectionConfig("mask"), train__old_logprobs="rollout")
    assert "objective.correction.method" in error.problem and "recompute" in error.mend
    assert "floor" in one_line(objective__correction=CorrectionConfig("mask", cap=0.1)).problem


def test_the_overlong_penalty_needs_an_objective_that_takes_it_and_room():
    assert "verdicts alone" in one_line(reward__overlong_buffer=8).problem
    assert "rollout.function is set" in one_line(rollout__function="a.py:f", rollout__tensor_parallel_size=2).problem
    assert "longer than rollout.max_tokens" in one_line(objective__name="dapo", reward__overlong_buffer=513).problem


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_eps_is_above_zero(eps):
    check(changed("objective.eps", 1e-6))
    assert "objective.eps" in refused(changed("objective.eps", eps)).problem


def test_a_step_is_whole_updates():
    config = changed("rollout.prompts_per_step", 24)
    assert "rollout.prompts_per_step (24)" in refused(config).problem and "train.prompts_per_update (16)" in refused(config).problem
    config.train.prompts_per_update = 12
    check(config)


def test_a_log_prob_pass_smaller_than_a_micro_batch():
    check(changed("train.logprob_tokens_per_micro_batch", 4096))
    error = refused(changed("train.logprob_tokens_per_micro_batch", 4095))
    assert error.problem == "train.logprob_tokens_per_micro_batch (4095) is less than train.tokens_per_micro_batch (4096)"


@pytest.mark.parametrize(
    "addresses, message",
    [
        (["node1:8000"], "'node1:8000' in rollout.served.addresses is no address of a server: write http://host:port"),
        (["http://node1"], "'http://node1' in rollout.served.addresses is no address"),
        (["http://node1:65536"], "'http://node1:65536' in rollout.served.addresses is no address"),
        (["http://a:1", "http://a:1/"], "rollout.served.addresses has an address twice"),
    ],
)
def test_addresses_of_servers(addresses, message):
    config = Config(run_dir="x")
    config.rollout.served.addresses = ["http://node-1.cluster:8000", "http://10.0.0.1:1/"]
    check(config)
    config.rollout.served.addresses = addresses
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_port_that_there_is_none():
    config = Config(run_dir="x")
    config.rollout.served.port = 65536
    with pytest.raises(UserError, match="rollout.served.port is 65536: use at most 65535"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("profile.steps", [3, 0], "profile.steps has 0: use whole numbers, 1 or more"),
        ("profile.ranks", [-1], "profile.ranks has -1: use whole numbers, 0 or more"),
        ("profile.stages", ["train", "end"], "profile.stages names 'end': use generate, batching, old_logprobs, train, sync, validate"),
    ],
)
def test_what_is_profiled(key, value, said):
    assert str(refused(changed(key, value))).startswith(said)

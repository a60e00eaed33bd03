"""Settings under Megatron's names: what is of no use or contradicts another."""

import re

import pytest

from megatron_nft.config import check, describe, load, load_with_sources, save
from megatron_nft.errors import UserError


@pytest.fixture
def read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("{run_dir: unused, model: {path: unused}}")
    return lambda overrides: load(file, overrides.split())


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("train.recompute_method=block", "train.recompute_method is set and train.recompute_granularity null"),
        ("train.recompute_num_layers=2 train.recompute_granularity=selective", "train.recompute_num_layers is set"),
        ("train.recompute_modules=[mlp] train.recompute_granularity=full", "train.recompute_modules is set"),
        ("train.recompute_modules=[mpl] train.recompute_granularity=selective", "train.recompute_modules is ['mpl']"),
        ("train.recompute_modules=[] train.recompute_granularity=selective", "train.recompute_modules is []"),
        ("model.fp8_param_gather=true", "model.fp8_param_gather is on and model.fp8 null"),
        ("model.first_last_layers_bf16=true", "model.first_last_layers_bf16 is on and model.fp8 null"),
        ("model.fp8=hybrid model.precision=fp32", "model.fp8 is hybrid and model.precision fp32"),
        ("model.fp8=hybrid model.precision=fp16", "model.fp8 is hybrid and model.precision fp16"),
        ("model.fp8=e4m3 model.fp8_recipe=delayed model.first_last_layers_bf16=true", "fp8_recipe delayed"),
        ("parallel.overlap_param_gather=true parallel.overlap_grad_reduce=false", "overlap_param_gather is on"),
        ("optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_dtype is bf16 and optimizer.use_precision_aware_optimizer false"),
        ("optimizer.use_precision_aware_optimizer=true model.precision=fp32", "use_precision_aware_optimizer is on"),
        ("optimizer.initial_loss_scale=4 optimizer.min_loss_scale=8", "optimizer.min_loss_scale (8) is above initial_loss_scale (4)"),
    ],
)
def test_refused(overrides, problem, read):
    with pytest.raises(UserError) as caught:
        read(overrides)
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    "overrides",
    [
        "train.recompute_granularity=full train.recompute_method=block train.recompute_num_layers=2",
        "train.recompute_granularity=selective train.recompute_modules=[core_attn,mlp]",
        "model.fp8=hybrid model.fp8_param_gather=true model.first_last_layers_bf16=true",
        "parallel.overlap_param_gather=true",
        "optimizer.use_precision_aware_optimizer=true optimizer.exp_avg_dtype=fp8",
    ],
)
def test_accepted(overrides, read):
    check(read(overrides))


def test_a_mapping_of_megatrons_fields_by_file_and_by_override(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("{run_dir: unused, model: {path: unused}, megatron: {transformer: {fp8_margin: 1}, ddp: {bucket_size: 1000}}}")
    config, sources = load_with_sources(file, ["megatron.transformer.fp8_margin=2", "megatron.optimizer={pin_cpu_grads: false}"])
    assert (config.megatron.transformer, config.megatron.ddp) == ({"fp8_margin": 2}, {"bucket_size": 1000})
    assert config.megatron.optimizer == {"pin_cpu_grads": False}
    assert re.search(r"megatron.transformer.fp8_margin +2 +command line", describe(config, sources))
    save(config, file)
    assert load(file) == config

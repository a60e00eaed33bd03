"""From the config to Megatron's config classes, and what is refused before a model is built."""

from types import SimpleNamespace

import pytest
import torch

from megatron_nft import policy
from megatron_nft.config import load
from megatron_nft.errors import UserError
from megatron_nft.policy import checks, model, optimizer, versions
from megatron_nft.weights import load_huggingface
from tests.support import tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def read(path, tmp_path):
    """A Config from overrides."""
    file = tmp_path / "config.yaml"
    file.write_text(f"{{run_dir: unused, model: {{path: {path}}}, train: {{tokens_per_micro_batch: 64}}}}")
    return lambda *overrides: load(file, list(overrides))


@pytest.fixture
def pretend(monkeypatch):
    """A machine with Transformer Engine and a GPU, as far as the checks can see."""
    from megatron.core.optimizer import optimizer_config

    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(versions, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def transformer(config):
    return model.transformer_config(load_huggingface(config.model.path).config, config)


def refused(config) -> UserError:
    with pytest.raises(UserError) as caught:
        policy.check(config, window=64)
    return caught.value


def test_every_setting_reaches_megatron(read, pretend):
    config = read(
        "model.fp8=hybrid", "model.fp8_recipe=blockwise", "model.fp8_param_gather=true", "model.first_last_layers_bf16=true",
        "model.num_layers_at_start_in_bf16=2", "model.num_layers_at_end_in_bf16=0", "train.recompute_granularity=full",
        "train.recompute_method=block", "train.recompute_num_layers=3", "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true", "optimizer.optimizer_cpu_offload=true", "optimizer.optimizer_offload_fraction=0.5",
        "optimizer.use_precision_aware_optimizer=true", "optimizer.main_grads_dtype=bf16", "optimizer.main_params_dtype=fp16",
        "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=fp8", "megatron.transformer.fp8_margin=2",
        "megatron.transformer.attention_backend=flash",
        "megatron.transformer.apply_rope_fusion=false",  # over this program's default; the kernel is not really there
        "megatron.ddp.bucket_size=1000", "megatron.optimizer.pin_cpu_grads=false",
    )  # fmt: skip
    got = transformer(config)
    assert (got.fp8, got.fp8_recipe, got.fp8_param, got.fp8_margin) == ("hybrid", "blockwise", True, 2)
    assert (got.first_last_layers_bf16, got.num_layers_at_start_in_bf16, got.num_layers_at_end_in_bf16) == (True, 2, 0)
    assert (got.recompute_granularity, got.recompute_method, got.recompute_num_layers) == ("full", "block", 3)
    assert got.attention_backend.name == "flash" and got.bf16 and got.params_dtype == torch.bfloat16
    ddp = optimizer.ddp_config(config)
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.fp8_param_gather, ddp.bucket_size) == (True, True, True, 1000)
    assert not ddp.grad_reduce_in_fp32  # main_grads_dtype
    adam = optimizer.optimizer_config(config)
    assert (adam.optimizer_cpu_offload, adam.optimizer_offload_fraction, adam.pin_cpu_grads) == (True, 0.5, False)
    assert (adam.main_grads_dtype, adam.main_params_dtype) == (torch.bfloat16, torch.float16)
    assert (adam.exp_avg_dtype, adam.exp_avg_sq_dtype, adam.fp8_recipe) == (torch.bfloat16, torch.uint8, "blockwise")


def test_selective_recompute_and_defaults(read):
    got = transformer(read("train.recompute_granularity=selective", "train.recompute_modules=[mlp]"))
    assert (got.recompute_granularity, got.recompute_modules, got.recompute_num_layers) == ("selective", ["mlp"], None)
    plain = read()
    assert transformer(plain).recompute_granularity is None and transformer(plain).fp8 is None
    ddp = optimizer.ddp_config(plain)
    assert ddp.grad_reduce_in_fp32 and ddp.check_for_nan_in_grad and not ddp.overlap_grad_reduce


@pytest.mark.parametrize(
    ("override", "problem", "mend"),
    [
        ("megatron.transformer.fp8_margn=1", "megatron.transformer.fp8_margn is no field of", "did you mean fp8_margin?"),
        ("megatron.ddp.bucket_sizes=1", "megatron.ddp.bucket_sizes is no field of", "did you mean bucket_size?"),
        ("megatron.optimizer.adam_beta1=0.5", "this program sets that field itself", "use optimizer.adam_beta1"),
        ("megatron.transformer.fp8_param=true", "this program sets that field itself", "use model.fp8_param_gather"),
        ("megatron.transformer.hidden_size=8", "this program sets that field itself", "it follows from the model"),
        ("megatron.transformer.sequence_parallel=true", "this program sets that field itself", "use parallel.sequence_parallel"),
        ("megatron.ddp.bucket_size=many", "megatron.ddp.bucket_size is 'many'", "Megatron's type is int or null"),
        ("megatron.transformer.fp8_margin=true", "megatron.transformer.fp8_margin is True", "Megatron's type is int"),
        ("megatron.transformer.init_method=normal", "megatron.transformer.init_method is 'normal'", "Megatron's type"),
        ("megatron.transformer.attention_backend=fast", "attention_backend is 'fast'", "AttnBackend"),
        ("megatron.transformer.delay_wgrad_compute=true", "refuses these settings: overlap_moe_expert", "change what it names"),
        ("megatron.transformer.cpu_offloading=true", "megatron.transformer.cpu_offloading is set", "this program trains another way"),
        ("megatron.transformer.softmax_scale=0.1", "megatron.transformer.softmax_scale is set", "as config.json does"),
        ("megatron.transformer.moe_aux_loss_coeff=0.1", "megatron.transformer.moe_aux_loss_coeff is set", "no auxiliary loss"),
        ("megatron.ddp.average_in_collective=true", "megatron.ddp.average_in_collective is set", "this program trains another way"),
        ("megatron.transformer.attention_backend=[flash]", "attention_backend is ['flash']", "AttnBackend"),
        ("megatron.transformer.autocast_dtype=[bf16]", "autocast_dtype is ['bf16']", "dtype"),
        ("megatron.transformer.gradient_accumulation_fusion=true", "gradient_accumulation_fusion is on", "leave it out"),
        ("model.fp8=hybrid", "model.fp8 is hybrid, but there is no GPU", "set model.fp8=null"),
        ("optimizer.optimizer_cpu_offload=true", "there is no GPU to offload from", "set it to false"),
        ("optimizer.use_precision_aware_optimizer=true", "Transformer Engine, whose FusedAdam", "set it to false"),
    ],
)  # fmt: skip
def test_refused(override, problem, mend, read):
    error = refused(read(override))
    assert problem in error.problem and mend in error.mend


def test_a_recipe_that_the_chip_lacks_is_refused_before_megatron_is_asked(read, pretend, monkeypatch):
    chip = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: chip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
    monkeypatch.setattr(versions, "prepare", lambda: pytest.fail("Megatron-Core is not to be touched"))
    error = refused(read("model.fp8=hybrid", "model.fp8_recipe=mxfp8"))
    assert error.problem.startswith("model.fp8_recipe is mxfp8, and NVIDIA H100 (compute capability 9.0) lacks it")


def test_norms_are_recomputed_by_transformer_engine_alone(read):
    config = read("train.recompute_granularity=selective", "train.recompute_modules=[layernorm]")
    assert "train.recompute_modules has layernorm" in refused(config).problem


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["train.tokens_per_micro_batch=72"], "train.tokens_per_micro_batch on a rank is 72.0"),
        (["model.fp8_recipe=mxfp8"], "the model's intermediate size on a tensor-parallel rank is 48.0"),
        (["parallel.tensor_model_parallel_size=2"], "the model's intermediate size on a tensor-parallel rank is 24.0"),
        (
            ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"],
            "intermediate size on a",
        ),
    ],
)
def test_fp8_with_odd_sizes(overrides, problem, read, path, pretend):
    """The tiny model: hidden 32, intermediate 48, 4 heads and 2 groups of 8, so 64 for queries, keys and values together."""
    hf = load_huggingface(path).config
    checks._check_fp8(hf, read("model.fp8=hybrid"))
    with pytest.raises(UserError) as caught:
        checks._check_fp8(hf, read("model.fp8=hybrid", *overrides))
    assert problem in caught.value.problem


def test_the_defaults_are_accepted(read):
    policy.check(read(), window=64)


def test_the_line_on_kernels(read, pretend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(versions, "fused_adam", lambda: "Transformer Engine")
    line = model.kernels(read("model.fp8=hybrid", "megatron.transformer.apply_rope_fusion=false"))
    assert line.startswith(f"Megatron-Core {versions.version()} on a GPU: Transformer Engine layers")
    assert line.endswith("bf16 and FP8 (hybrid, tensorwise), Transformer Engine's FusedAdam")
    monkeypatch.setattr(versions, "have_transformer_engine", lambda: False)
    monkeypatch.setattr(versions, "fused_adam", lambda: None)
    assert "local layers, torch varlen_attn over packed sequences, bf16, torch AdamW" in model.kernels(read())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.kernels(read("model.precision=fp16")).endswith("scaled_dot_product_attention over packed sequences, fp16, torch AdamW")


@pytest.mark.parametrize("module", ["moe", "shared_experts"])
def test_what_a_dense_model_has_not_is_not_recomputed(module, read):
    error = refused(read("train.recompute_granularity=selective", f"train.recompute_modules=[{module}]"))
    assert f"train.recompute_modules has {module}, which the model has not" in error.problem


@pytest.mark.parametrize("layers, fits", [(1, True), (2, True), (3, False)])
def test_recomputed_runs_of_layers_divide_a_stage(layers, fits, read):
    config = read("train.recompute_granularity=full", f"train.recompute_num_layers={layers}")
    if not fits:
        assert "train.recompute_num_layers (3) does not divide the 4 layers" in refused(config).problem
        config.train.recompute_method = "block"
    checks.check(config, 64)

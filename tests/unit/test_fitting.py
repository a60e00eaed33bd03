"""A GPU that is too small: by exact bytes refused, by estimate told of. A GPU of any size stands in for the real one."""

import pytest

from megatron_nft import fitting, policy
from megatron_nft.config import load
from megatron_nft.errors import UserError
from megatron_nft.planner import least, models
from megatron_nft.planner.holdings import Stage
from megatron_nft.policy.devices import Gpu
from tests.support import ROOT

GIB = 2**30


@pytest.fixture
def there(monkeypatch):
    """config of an example, on GPUs of so many GiB in so many ranks."""
    hf = models.find("Qwen2.5-32B").hf

    def make(gib: float | None, ranks: int, *overrides: str):
        config = load(ROOT / "examples/qwen2.5_32b/nft.yaml", ["model.path=models/Qwen2.5-32B", *overrides])
        gpu = None if gib is None else Gpu(0, "NVIDIA A100-SXM4-40GB", int(gib * GIB))
        monkeypatch.setattr(fitting, "own_gpu", lambda: gpu)
        monkeypatch.setattr(fitting, "_hf", lambda config: hf)
        monkeypatch.setattr(policy, "world_size", lambda: ranks)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        return config

    monkeypatch.delenv("RANK", raising=False)
    return make


def refused(config, **more) -> UserError:
    with pytest.raises(UserError) as caught:
        fitting.check_trainer(config, **({"sampling": True} | more))
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_preset_on_its_own_gpus_passes_and_without_gpus_nothing_is_said(there, capsys):
    for gib in (79.1, None):
        config = there(gib, 128)
        fitting.check_trainer(config, sampling=True)
        fitting.warn(config)
    assert not capsys.readouterr().err


def test_what_training_certainly_takes_is_refused(there):
    """One node: 8 tensor-parallel ranks, each with 4.1 billion parameters, and the optimizer's whole state."""
    config = there(39.5, 8)
    error = refused(config)
    [stage] = Stage.all(models.find("Qwen2.5-32B").hf, config, least.Layout.of_ranks(config, 8))
    whole = (stage.fullest.device + least.CONTEXT) / GIB
    assert whole > 16 * stage.numel / GIB  # 2 + 4 + 12 bytes, padding included
    assert error.problem.startswith("GPU 0 (NVIDIA A100-SXM4-40GB) is too small for this config: training needs at least ")
    assert f"at least {whole:.1f} GiB (optimizer {stage.fullest.optimizer / GIB:.1f}, gradients " in error.problem
    assert "of 39.5 on this GPU" in error.problem and "optimizer.optimizer_cpu_offload=true" in error.mend
    with pytest.raises(UserError, match="training needs at least"):
        fitting.check_trainer(config, sampling=False)
    fitting.check_trainer(there(39.5, 8, "optimizer.optimizer_cpu_offload=true", "optimizer.use_precision_aware_optimizer=true"), False)


def test_what_vllm_asks_for_at_its_start_is_refused(there):
    error = refused(there(79.1, 128, "rollout.gpu_memory_utilization=0.95"))
    assert "generating needs at least" in error.problem and "vLLM with rollout.gpu_memory_utilization 0.95 75.1" in error.problem
    assert error.mend.startswith("lower rollout.gpu_memory_utilization")
    config = there(79.1, 128, "rollout.gpu_memory_utilization=0.95", "rollout.vllm={kv_cache_memory_bytes: 1000000000}")
    fitting.check_trainer(config, sampling=True)  # another rule decides
    fitting.check_trainer(there(79.1, 128, "rollout.gpu_memory_utilization=0.95", "replay=runs/other"), sampling=True)


def test_an_engine_whose_weights_and_one_answer_do_not_fit(there):
    config = there(39.5, 1, "rollout.tensor_parallel_size=1", "rollout.gpu_memory_utilization=0.9", "rollout.quantization=null")
    with pytest.raises(
        UserError, match=r"the vLLM engine needs at least 6\d\.\d GiB \(weights 61\.\d, the KV cache of one .*gives it: raise"
    ):
        fitting.check_engine(config, 16384)
    fitting.check_engine(there(39.5, 1, "rollout.tensor_parallel_size=2"), 16384)
    config.rollout.quantization = "awq"  # whose bytes are not known here
    there(5, 1)
    fitting.check_engine(config, 16384)


def test_the_estimate_alone_is_a_warning(there, capsys, monkeypatch):
    config = there(79.1, 128, "train.tokens_per_micro_batch=65536")
    fitting.check_trainer(config, sampling=True)
    fitting.warn(config)
    said = capsys.readouterr().err
    assert said.startswith("megatron-nft: warning: train needs ") and said.count("\n") == 1 and "as the planner estimates" in said
    monkeypatch.setenv("RANK", "1")
    fitting.warn(config)
    assert not capsys.readouterr().err


def test_layers_that_the_planner_cannot_deal_are_let_pass(there, capsys):
    config = there(10, 8, "megatron.transformer={num_layers_in_first_pipeline_stage: 8}")
    fitting.check_trainer(config, sampling=True)
    fitting.warn(config)
    assert not capsys.readouterr().err

"""What vLLM is started with, as keyword arguments and as flags, and what this machine refuses."""

import argparse
import json

import pytest
import torch

from megatron_nft.config import Config, RolloutConfig
from megatron_nft.config.engine import OWNED, SETTINGS
from megatron_nft.config.engine import check as check_settings
from megatron_nft.errors import UserError
from megatron_nft.rollout import arguments
from megatron_nft.rollout.arguments import command_line, engine_arguments

NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "num_speculative_tokens": 3}
DRAFT = {"method": "eagle3", "model": "/draft", "num_speculative_tokens": 3}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def made(**settings) -> dict:
    return engine_arguments(RolloutConfig(**settings), "model", 4096, "bf16", seed=3)


def test_what_is_not_set_is_left_to_vllm(gpu):
    assert not {"enable_prefix_caching", "enable_chunked_prefill", "quantization", "compilation_config", "speculative_config"} & set(made())


def test_every_setting_goes_through(gpu):
    got = made(
        enable_prefix_caching=False, enable_chunked_prefill=True, cudagraph_mode="PIECEWISE", quantization="fp8", kv_cache_dtype="fp8",
        speculative_config=NGRAM, max_num_seqs=7, max_num_batched_tokens=99, gpu_memory_utilization=0.5, vllm={"block_size": 32},
    )  # fmt: skip
    wanted = {
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "compilation_config": {"cudagraph_mode": "PIECEWISE"},
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "speculative_config": NGRAM,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 99,
        "gpu_memory_utilization": 0.5,
        "block_size": 32,
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "logprobs_mode": "processed_logprobs",
    }
    assert {name: got[name] for name in wanted} == wanted


def test_without_a_gpu_no_prompt_is_split():
    got = made(max_num_batched_tokens=8)
    assert (got["enable_chunked_prefill"], got["max_num_batched_tokens"], got["enforce_eager"]) == (False, 4096, True)
    assert made(enable_prefix_caching=False)["enable_prefix_caching"] is False


def test_a_draft_model_is_read_from_its_files_whatever_the_model_is(monkeypatch):
    monkeypatch.setattr(arguments, "is_checkpoint", lambda path: True)
    assert made()["load_format"] == "dummy"
    assert made(speculative_config=DRAFT)["speculative_config"] == {**DRAFT, "draft_load_config": {"load_format": "auto"}}
    assert made(speculative_config=NGRAM)["speculative_config"] == NGRAM


def test_flags_are_what_the_arguments_are(gpu):
    """As vLLM's parser reads them: a flag and its negation, JSON, plain values."""
    got = made(enable_chunked_prefill=False, enforce_eager=True, speculative_config=NGRAM)
    words = command_line(got)
    assert "--no-enable-chunked-prefill" in words and "--enforce-eager" in words
    parser = argparse.ArgumentParser()
    for name, value in got.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, type=json.loads if isinstance(value, dict) else type(value))
    assert vars(parser.parse_args(words)) == got


@pytest.mark.parametrize(
    ("setting", "value"),
    [("quantization", "fp8"), ("enable_chunked_prefill", True), ("cudagraph_mode", "FULL")],
)
def test_what_needs_a_gpu(setting, value, monkeypatch):
    rollout = RolloutConfig(**{setting: value})
    with pytest.raises(UserError, match=f"rollout.{setting} is {value}"):
        arguments.check(rollout)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    arguments.check(rollout)


def test_an_fp8_cache_on_an_old_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(UserError, match="AVX-512"):
        arguments.check(RolloutConfig(kv_cache_dtype="fp8"))
    arguments.check(RolloutConfig())


def test_speculation_that_vllm_does_not_know(tmp_path):
    with pytest.raises(UserError, match="rollout.speculative_config.lookup is no field of vLLM"):
        arguments.check(RolloutConfig(speculative_config={**NGRAM, "lookup": 3}))
    with pytest.raises(UserError, match="no directory at /draft"):
        arguments.check(RolloutConfig(speculative_config=DRAFT))
    arguments.check(RolloutConfig(speculative_config={**DRAFT, "model": str(tmp_path)}))


def test_what_vllm_refuses_is_one_line():
    from vllm.config import CacheConfig

    with pytest.raises(UserError, match=r"vLLM refuses its CacheConfig \(block_size\): .*greater") as caught, arguments.refusals_told():
        CacheConfig(block_size=-1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="ours"), arguments.refusals_told():  # a fault of another kind stays one
        raise ValueError("ours")


def refused(**settings) -> str:
    with pytest.raises(UserError) as caught:
        check_settings(Config(rollout=RolloutConfig(**settings)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_the_users():
    for name in SETTINGS:
        assert f"rollout.vllm.{name} has a setting of its own" in refused(vllm={name: 1})
    for name in OWNED:
        assert f"rollout.vllm.{name} is not to be set" in refused(vllm={name: 1})


def test_what_the_program_sets_is_not_the_users(gpu):
    """What rollout.vllm may hold goes over nothing that is set, but for compilation_config, where cudagraph_mode is refused."""
    assert set(made(enable_chunked_prefill=True, enable_prefix_caching=True, quantization="fp8", cudagraph_mode="FULL",
                    speculative_config=NGRAM)) <= {*SETTINGS, *OWNED, "compilation_config"}  # fmt: skip


def test_settings_that_do_not_go_together():
    assert "no num_speculative_tokens" in refused(speculative_config={"method": "ngram"})
    assert "method eagle3 and no model" in refused(speculative_config={"method": "eagle3", "num_speculative_tokens": 2})
    assert "rollout.stop and rollout.speculative_config" in refused(speculative_config=NGRAM, stop=["\n"])
    both = refused(vllm={"compilation_config": {"mode": 0}}, cudagraph_mode="FULL")
    assert "rollout.cudagraph_mode is set, and rollout.vllm.compilation_config, too" in both
    assert "enforce_eager is true and rollout.cudagraph_mode FULL" in refused(enforce_eager=True, cudagraph_mode="FULL")
    for number in (0, -1, "x", 1.5, True):
        assert f"num_speculative_tokens is {number!r}" in refused(speculative_config={**NGRAM, "num_speculative_tokens": number})
    assert "max_num_batched_tokens (8) is less than rollout.max_num_seqs (9)" in refused(max_num_batched_tokens=8, max_num_seqs=9)
    assert "rollout.max_num_seqs (7) is less than rollout.n (8)" in refused(max_num_seqs=7)
    for right in ({"speculative_config": DRAFT}, {"max_num_seqs": 8}, {"stop": ["</answer>", "\n\n"]}, {"vllm": {"block_size": 16}}):
        check_settings(Config(rollout=RolloutConfig(**right)))

"""Real vLLM engines with settings that make them faster: what they sample stays what the model says."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import topology
from megatron_nft.rollout import Engine, Request
from megatron_nft.rollout.kv_scales import HEADROOM, RANGE
from tests.end_to_end.test_engine import TOLERANCE, WINDOW, assert_matches, load, make_model, prompt, requests, weights_of
from tests.support import add_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    first, second = (make_model(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1))
    add_tokenizer(first)
    return first, second


@pytest.fixture
def start(models):
    """Makes an engine in a world of one; the environment is left as it was."""
    before, engines = dict(os.environ), []
    topology.start_distributed()

    def make(**settings) -> Engine:
        engines.append(Engine(str(models[0]), RolloutConfig(max_num_seqs=64, cpu_kvcache_space=1, **settings), WINDOW, "fp32", seed=1))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    topology.shutdown()
    os.environ.clear()
    os.environ.update(before)


def test_speculation_changes_no_greedy_token_and_no_log_prob(start, models):
    """Prompts that repeat themselves, so that the drafts are sometimes right. With a temperature the draws are others, of the same
    distribution, and the same again in any batch. After a sync it is the new model that is asked."""
    engine = start(speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1})
    greedy = [Request(prompt(20, seed) * 3, 0.0, 1.0, 60, seed) for seed in range(6)]
    sampled = requests(6)
    for version, path in enumerate(models):
        if version:
            engine.sync(weights_of(path), version)
        engine.throughput.begin()
        answers = engine.generate([*greedy, *sampled])
        counted = engine.throughput.take()
        assert counted["draft_tokens"] > 0 and 0 < counted["acceptance"] < 1
        assert ("sync_seconds" in counted) == bool(version)
        for request, answer in zip(greedy, answers):
            rows = load(path)(torch.tensor([[*request.token_ids, *answer.token_ids]])).logits[0, len(request.token_ids) - 1 : -1]
            assert answer.token_ids == rows.argmax(1).tolist()
        for request, answer in zip([*greedy, *sampled], answers):
            if request.temperature:
                assert_matches(path, request, answer)
    again = engine.generate(sampled[::-1])[::-1]
    for one, other in zip(again, answers[len(greedy) :]):
        assert one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, rel=0, abs=TOLERANCE)


def largest_keys(path: Path, prompts: list[list[int]]) -> list[float]:
    """Of each layer, by transformers."""
    largest = [0.0] * len(load(path).model.layers)
    for ids in prompts:
        with torch.no_grad():
            cache = load(path)(torch.tensor([ids]), use_cache=True).past_key_values
        largest = [max(before, float(layer.keys.abs().max())) for before, layer in zip(largest, cache.layers)]
    return largest


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache needs AVX-512 on a CPU")
def test_the_scales_of_an_fp8_cache_are_those_of_the_newest_weights(start, models):
    engine = start(kv_cache_dtype="fp8")
    prompts = [list(prompt(30 + i, i)) for i in range(8)]
    engine.scale_cache_by([SimpleNamespace(token_ids=ids) for ids in prompts])
    for version, path in enumerate(models):
        if version:
            engine.sync(weights_of(path), version)
        scales = engine._llm.apply_model(lambda model: [m._k_scale_float for m in model.modules() if hasattr(m, "_k_scale_float")])[0]
        wanted = [HEADROOM * largest / RANGE for largest in largest_keys(path, prompts)]
        assert scales == pytest.approx(wanted, rel=0.1)  # layers above the first see what the cache has rounded
        assert scales[0] == pytest.approx(wanted[0], rel=1e-5)
    assert engine.generate(requests(4))[0].weight_version == 1

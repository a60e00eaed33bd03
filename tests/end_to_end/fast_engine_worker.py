"""Two engines against transformers, before and after a sync. One drafts by n-grams: same greedy tokens, same log-probs. One has an FP8
cache: its scales are of the newest weights."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import topology
from megatron_nft.rollout import Engine, Request
from megatron_nft.rollout.kv_scales import HEADROOM, RANGE
from tests.end_to_end.test_engine import TOLERANCE, WINDOW, assert_matches, load, prompt, reference, requests, weights_of

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


def start(model: Path, **settings) -> Engine:
    return Engine(str(model), RolloutConfig(max_num_seqs=64, cpu_kvcache_space=1, **settings), WINDOW, "fp32", seed=1)


def check_scales(models: list[Path]) -> None:
    engine = start(models[0], kv_cache_dtype="fp8")
    prompts = [list(prompt(30 + i, i)) for i in range(8)]
    engine.scale_cache_by([SimpleNamespace(token_ids=ids) for ids in prompts])
    for version, path in enumerate(models):
        if version:
            engine.sync(weights_of(path), version)
        scales = engine._llm.apply_model(lambda model: [m._k_scale_float for m in model.modules() if hasattr(m, "_k_scale_float")])[0]
        wanted = [HEADROOM * largest / RANGE for largest in largest_keys(path, prompts)]
        assert scales[0] == pytest.approx(wanted[0], rel=1e-5)
        assert scales == pytest.approx(wanted, rel=0.1)  # layers above the first see what the cache has rounded
    assert engine.generate(requests(4))[0].weight_version == 1


def largest_keys(path: Path, prompts: list[list[int]]) -> list[float]:
    """Of each layer, by transformers."""
    largest = [0.0] * len(load(path).model.layers)
    for ids in prompts:
        cache = load(path)(torch.tensor([ids]), use_cache=True).past_key_values
        largest = [max(before, float(layer.keys.abs().max())) for before, layer in zip(largest, cache.layers)]
    return largest


def check_speculation(models: list[Path]) -> None:
    engine = start(models[0], speculative_config=NGRAM)
    greedy = [Request(prompt(20, seed) * 3, 0.0, 1.0, 60, seed) for seed in range(6)]  # repetitions, so that drafts are sometimes right
    sampled = [*requests(6), *requests(6, temperature=2.0)]
    for version, path in enumerate(models):
        if version:
            engine.sync(weights_of(path), version)
        engine.throughput.begin()
        answers = engine.generate([*greedy, *sampled])
        counted = engine.throughput.take()
        assert counted["draft_tokens"] > 0 and 0 < counted["acceptance"] < 1
        assert ("sync_seconds" in counted) == bool(version)
        for request, answer in zip(greedy, answers):
            rows = reference(path, [*request.token_ids, *answer.token_ids])[len(request.token_ids) - 1 :]
            top = rows.topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 2 * TOLERANCE, "a tie that rounding could break: choose another seed"
            assert answer.token_ids == rows.argmax(1).tolist()
        for request, answer in zip(sampled, answers[len(greedy) :]):
            assert_matches(path, request, answer, request.temperature)
    alone = engine.generate(sampled[::-1])[::-1]  # a seed draws the same in any batch
    for one, other in zip(alone, answers[len(greedy) :]):
        assert one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, rel=0, abs=TOLERANCE)


def main() -> None:
    models = [Path(model) for model in json.loads(Path(sys.argv[1]).read_text())["models"]]
    topology.start_distributed()
    if torch.cpu._is_avx512_supported():  # vLLM's FP8 cache needs it on a CPU
        check_scales(models)
    check_speculation(models)  # last: where vLLM 0.32 has drafted by n-grams, no other engine starts
    topology.shutdown()


if __name__ == "__main__":
    with torch.no_grad():
        main()

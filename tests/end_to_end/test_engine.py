"""A real vLLM engine on a tiny model: what it samples is what transformers computes, before and after new weights."""

import functools
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import topology
from megatron_nft.rollout import Engine, Request
from megatron_nft.stopping import Stopped
from tests.support import add_tokenizer, one_bucket, tiny_model

END = 2  # the tokenizer's <|im_end|>
VOCABULARY = 304
WINDOW = 320  # tokens: more than two blocks of vLLM's prefix cache on a CPU
TOLERANCE = 1e-5  # float32 sums in another order


def make_model(directory: Path, seed: int) -> Path:
    """Heads of 32: vLLM's attention on a CPU has none of 8."""
    changes = {"hidden_size": 128, "vocab_size": VOCABULARY, "eos_token_id": END, "max_position_embeddings": 512, "initializer_range": 0.12}
    return tiny_model(directory, seed=seed, **changes)


def make_models(folder: Path) -> tuple[Path, Path]:
    """Two models of one shape: that of the start, with a tokenizer, and that of the new weights."""
    first, second = (make_model(folder / f"model{seed}", seed) for seed in (0, 1))
    add_tokenizer(first)
    return first, second


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(models) -> Iterator[Engine]:
    """One engine for all tests here, in a world of one; the environment is left as it was."""
    before = dict(os.environ)
    topology.start_distributed()
    rollout = RolloutConfig(max_num_seqs=64, cpu_kvcache_space=1)
    engine = Engine(str(models[0]), rollout, WINDOW, "fp32", seed=1)
    yield engine
    engine.close()
    topology.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def first_weights(engine, models):
    """Every test starts with the first model's weights, version 0."""
    if engine.weight_version != 0:
        engine.sync(weights_of(models[0]), version=0)


@functools.cache
def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def weights_of(path: Path, without: str = "") -> Iterator[SimpleNamespace]:
    """Full tensors under their Hugging Face names, in two buckets with a layer in both; the tied head is no tensor of its own."""
    tensors = [(name, tensor.detach().clone()) for name, tensor in load(path).named_parameters() if name != without]
    return map(one_bucket, (tensors[:20], tensors[20:]))


def reference(path: Path, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of every next token by transformers, at a temperature. [tokens - 1, vocabulary]"""
    with torch.no_grad():
        return torch.log_softmax(load(path)(torch.tensor([ids])).logits[0, :-1].double() / temperature, dim=-1)


def of_tokens(rows: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests(count: int = 12, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 40) -> list[Request]:
    return [Request(prompt(3 + i, seed=i), temperature, top_p, max_tokens, seed=1000 + i) for i in range(count)]


def assert_matches(path: Path, request: Request, response, temperature: float = 1.0) -> None:
    ids = [*request.token_ids, *response.token_ids]
    expected = of_tokens(reference(path, ids, temperature), ids)[len(request.token_ids) - 1 :]
    torch.testing.assert_close(torch.tensor(response.logprobs).double(), expected, rtol=0, atol=TOLERANCE)


def test_sampled_logprobs_are_those_of_transformers(engine, models):
    asked = requests()
    for request, response in zip(asked, engine.generate(asked)):
        assert len(response.logprobs) == len(response.token_ids) and response.weight_version == 0
        assert_matches(models[0], request, response)


def test_sampled_logprobs_are_those_of_rescoring(engine):
    asked = requests()
    answers = engine.generate(asked)
    scores = engine.token_logprobs([[*request.token_ids, *answer.token_ids] for request, answer in zip(asked, answers)])
    for request, answer, score in zip(asked, answers, scores):
        assert len(score) == len(request.token_ids) + len(answer.token_ids) - 1
        assert score[len(request.token_ids) - 1 :] == pytest.approx(answer.logprobs, rel=0, abs=TOLERANCE)


def test_given_up_answers_leave_a_clean_engine(engine, monkeypatch):
    """What is asked next is answered as if nothing had been."""
    others = requests(temperature=0.6)
    expected = engine.generate(others)
    answers = iter([False, False, True])  # asked every eight scheduler steps
    monkeypatch.setattr(engine, "_asked_to_stop", lambda: next(answers))
    done = []
    with pytest.raises(Stopped):
        engine.generate(requests(), lambda index, _: done.append(index))
    assert len(done) < len(expected)
    assert not engine._engine.has_unfinished_requests()
    monkeypatch.setattr(engine, "_asked_to_stop", None)
    assert engine.generate(others) == expected


def test_the_generators_of_the_process_are_left_alone(engine):
    """vLLM draws from torch's for a greedy answer beside a sampled one."""
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes())
    engine.generate([*requests(3), *requests(3, temperature=0.0)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == before[1:]


def test_temperature_is_part_of_the_logprobs(engine, models):
    asked = requests(4, temperature=0.6)
    for request, response in zip(asked, engine.generate(asked)):
        assert_matches(models[0], request, response, temperature=0.6)


def test_top_p_renormalises_over_the_nucleus(engine, models):
    """Of the tokens that together first reach 0.5, each has its probability over their sum."""
    asked = requests(4, top_p=0.5, max_tokens=20)
    for request, response in zip(asked, engine.generate(asked)):
        ids = [*request.token_ids, *response.token_ids]
        probabilities = reference(models[0], ids).exp()[len(request.token_ids) - 1 :]
        for row, token, logprob in zip(probabilities, response.token_ids, response.logprobs):
            ordered = row.sort(descending=True)
            nucleus = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
            assert token in ordered.indices[:nucleus]
            assert logprob == pytest.approx(float((row[token] / ordered.values[:nucleus].sum()).log()), abs=TOLERANCE)


def test_greedy_is_the_argmax_of_transformers(engine, models):
    asked = requests(6, temperature=0.0)
    for request, response in zip(asked, engine.generate(asked)):
        rows = reference(models[0], [*request.token_ids, *response.token_ids])[len(request.token_ids) - 1 :]
        top = rows.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 2 * TOLERANCE  # no tie that rounding could break
        assert response.token_ids == rows.argmax(1).tolist()


def test_a_seed_gives_the_same_answer_in_any_batch(engine):
    asked = requests(12)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked[:3]]
    backwards = engine.generate(asked[::-1])[::-1]
    for a, b in itertools.chain(zip(together, alone), zip(together, backwards)):
        assert a.token_ids == b.token_ids and a.logprobs == pytest.approx(b.logprobs, rel=0, abs=TOLERANCE)
    other = engine.generate([Request(r.token_ids, r.temperature, r.top_p, r.max_tokens, r.seed + 500) for r in asked])
    assert sum(a.token_ids == b.token_ids for a, b in zip(together, other)) <= 1


def test_finish_reasons_and_the_end_token(engine):
    """An answer that stops holds its end token, with a log-prob, and no token after it; one that is cut off holds none."""
    asked = requests(48, temperature=2.0)
    answers = engine.generate(asked)
    for answer in answers:
        assert answer.finish_reason in ("stop", "length") and "<|im_end|>" not in answer.text
        assert (answer.token_ids[-1] == END) == (answer.finish_reason == "stop") and END not in answer.token_ids[:-1]
        assert len(answer.token_ids) == 40 if answer.finish_reason == "length" else len(answer.token_ids) <= 40
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_a_stop_string_ends_an_answer_which_keeps_it(engine):
    """Found in the text, across tokens; one that never comes changes nothing; other answers of the batch go on."""
    [whole] = engine.generate(requests(1, temperature=0.0))
    assert len(whole.token_ids) == 40 and len(whole.text) > 20
    string = whole.text[9:12]
    asked = [replace(requests(1, temperature=0.0)[0], stop=stop) for stop in ((), ("never, never", string), ("never, never",))]
    plain, stopped, never = engine.generate(asked)
    assert plain == never == whole
    assert stopped.finish_reason == "stop" and string in stopped.text
    count = len(stopped.token_ids)
    assert count < 40 and stopped.token_ids == whole.token_ids[:count]
    assert stopped.logprobs == pytest.approx(whole.logprobs[:count], rel=0, abs=TOLERANCE)
    assert string not in engine.decode(stopped.token_ids[:-1])


def test_answers_are_handed_over_as_they_finish(engine):
    asked = [Request(prompt(5), 1.0, 1.0, max_tokens, seed=1) for max_tokens in (30, 1, 10)]
    handed: list[tuple] = []
    answers = engine.generate(asked, lambda index, response: handed.append((index, response)))
    assert [len(a.token_ids) for a in answers] == [30, 1, 10], "choose a seed whose answer does not stop early"
    assert [index for index, _ in handed] == [1, 2, 0]
    assert all(response is answers[index] for index, response in handed)


def test_nothing_to_do(engine):
    assert engine.generate([]) == [] and engine.token_logprobs([]) == []


def test_the_whole_window_can_be_written_and_all_but_a_token_scored(engine):
    request = Request(prompt(WINDOW - 10), 1.0, 1.0, 10, seed=5)
    answer = engine.generate([request])[0]
    ids = [*request.token_ids, *answer.token_ids]
    scores = engine.token_logprobs([ids[:-1]])[0]
    assert len(ids) == WINDOW and scores[-9:] == pytest.approx(answer.logprobs[:-1], rel=0, abs=TOLERANCE)
    with pytest.raises(Exception, match="longer than the maximum model length"):
        engine.token_logprobs([ids])


def cached_tokens(engine: Engine, asked: list[Request], monkeypatch) -> tuple[list, int]:
    """The answers, and how many prompt tokens vLLM took from its prefix cache."""
    seen, step = [], engine._engine.step

    def watched():
        outputs = step()
        seen.extend(output.num_cached_tokens for output in outputs)
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "step", watched)
        return engine.generate(asked), sum(seen)


def test_sync_replaces_the_weights_and_empties_the_prefix_cache(engine, models, monkeypatch):
    asked = [Request(prompt(280, seed=9), 1.0, 1.0, 8, seed) for seed in (1, 2)]
    engine.generate(asked[:1])
    old, cached = cached_tokens(engine, asked, monkeypatch)
    assert cached > 0, "the prompt is too short for the prefix cache: nothing is tested"
    engine.sync(weights_of(models[1]), version=3)
    new, cached = cached_tokens(engine, asked[:1], monkeypatch)
    assert cached == 0 and engine.weight_version == new[0].weight_version == 3
    assert_matches(models[1], asked[0], new[0])
    assert new[0].token_ids != old[0].token_ids
    again = requests(3)
    for request, response in zip(again, engine.generate(again)):
        assert_matches(models[1], request, response)


def test_sync_there_and_back_gives_the_first_answers(engine, models):
    before = engine.generate(requests(4))
    for version, path in ((1, models[1]), (2, models[0])):
        engine.sync(weights_of(path), version)
    after = engine.generate(requests(4))
    assert [(r.token_ids, r.logprobs) for r in after] == [(r.token_ids, r.logprobs) for r in before]
    assert {r.weight_version for r in after} == {2}


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.2.self_attn.k_proj.bias", "model.embed_tokens.weight"])
def test_a_stream_that_leaves_a_tensor_out_is_refused(engine, models, missing):
    """One of a fused layer's three, too. A whole stream afterwards mends it."""
    stream = weights_of(models[1], without=missing)
    with pytest.raises(RuntimeError, match=f"1 tensors are missing from the weight stream, e.g. {missing}"):
        engine.sync(stream, version=8)
    assert engine.weight_version == 0
    engine.sync(weights_of(models[1]), version=9)
    request = requests(1)[0]
    assert_matches(models[1], request, engine.generate([request])[0])


def test_gather_in_a_world_of_one(engine):
    assert (engine.count, engine.index, engine.is_first) == (1, 0, True) and engine.gather({"a": 1}) == [{"a": 1}]

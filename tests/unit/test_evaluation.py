"""Accuracies, intervals and files of an evaluation, with fake engines; the layout changes nothing."""

import json

import pytest

from megatron_nft.config import Config, EvaluationConfig, RolloutConfig
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers_expected, bootstrap, check, evaluate, table, wilson, write_results
from megatron_nft.prompts import PromptSet
from megatron_nft.rewards import Judge
from tests.unit.rollout.fakes import CHANCE, MIXED, RIGHT, WRONG, FakeEngine, fake_prompt, on_ranks

K = 3  # with the greedy answer 4 a problem: of MIXED the greedy one and the second sampled one are right
CONFIG = Config(evaluation=EvaluationConfig(k=K), rollout=RolloutConfig(max_tokens=16))
SETS = {
    "easy": PromptSet([fake_prompt(kind, i) for i, kind in enumerate([RIGHT, RIGHT, MIXED, WRONG])]),
    "chance": PromptSet([fake_prompt(CHANCE, 10 + i) for i in range(7)]),
}


@pytest.fixture(scope="module")
def judge():
    with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
        yield judge


def run(engine: FakeEngine, judge: Judge):
    return evaluate(engine, judge if engine.is_first else None, SETS, CONFIG, "step 3")


def test_accuracies_by_hand(judge):
    result = run(FakeEngine(K + 1), judge)
    easy = result.summary["sets"]["easy"]
    assert easy["problems"] == 4
    assert easy["greedy"] == 3 / 4
    assert easy[f"avg@{K}"] == pytest.approx((1 + 1 + 1 / 3 + 0) / 4)
    assert easy[f"pass@{K}"] == 3 / 4
    assert easy["outcomes"] == {"right": 3 + 2 * K + 1, "wrong": 16 - 10, "no_answer": 0, "timed_out": 0, "crashed": 0}
    assert easy["truncated_share"] == 4 / 16  # the fake's WRONG answers are as long as may be
    assert result.metrics().keys() == {f"validation/{name}/{kind}" for name in SETS for kind in ("greedy", f"avg@{K}")}
    assert result.metrics()["validation/easy/greedy"] == 3 / 4


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (3, 1), (4, 2)])
def test_engines_share_the_problems_and_agree(ranks, tp, judge):
    alone = run(FakeEngine(K + 1), judge).summary
    together = on_ranks(ranks, K + 1, lambda engine: run(engine, judge), tp)
    assert all(result.summary == alone for result in together)
    answered = sum(len(groups) for result in together for groups in result.answers.values())
    assert answered == 2 * sum(map(len, SETS.values()))


def test_seeds_are_those_of_the_problem_and_sample_alone(judge):
    engines = [FakeEngine(K + 1), FakeEngine(K + 1)]
    for engine in engines:
        run(engine, judge)
    assert engines[0].requests == engines[1].requests
    sampled = [request for request in engines[0].requests if request.temperature > 0]
    assert len({request.seed for request in sampled}) == len(sampled) == K * 11
    assert answers_expected(engines[0], SETS, CONFIG.evaluation) == len(engines[0].requests)


def test_the_file_and_the_table(judge, tmp_path):
    result = run(FakeEngine(K + 1), judge)
    path = write_results(tmp_path, "step_3", result)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result.summary))
    lines = table(result).split("\n")
    assert lines[0].split() == ["set", "problems", "greedy", f"avg@{K}", f"pass@{K}", "tokens", "cut", "off"]
    assert lines[1].startswith("easy    4         75.0 [30.1, 95.4]") and len(lines) == 3


def test_nothing_to_do_is_refused():
    with pytest.raises(UserError, match="no problem"):
        check({}, CONFIG.evaluation)
    with pytest.raises(UserError, match="greedy is false"):
        check(SETS, EvaluationConfig(k=0, greedy=False))


def test_wilson():
    """Values of the closed form, worked out by hand."""
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_is_the_spread_of_the_mean():
    """For 200 yes-or-no values the interval is 0.5 -+ 1.96 sqrt(0.25 / 200) = 0.069, up to the resampling's own noise."""
    low, high = bootstrap([0.0, 1.0] * 100)
    assert low == pytest.approx(0.431, abs=0.01) and high == pytest.approx(0.569, abs=0.01)
    assert bootstrap([0.25] * 9) == (0.25, 0.25)

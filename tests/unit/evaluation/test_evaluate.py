"""An evaluation on fake engines: accuracies, seeds, sets with settings of their own. Neither the layout nor a stop changes anything."""

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest

from megatron_nft.config import Config, EvaluationConfig, EvaluationSetConfig, RolloutConfig
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation.answers import Answers
from megatron_nft.evaluation.evaluate import answers_expected, evaluate, summarise, write_results
from megatron_nft.evaluation.problems import all_problems, requests
from megatron_nft.prompts import PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.stopping import Stopped
from megatron_nft.trajectories import Verdict
from tests.unit.rollout.fakes import CHANCE, MIXED, RIGHT, WRONG, FakeEngine, fake_prompt, on_ranks

K = 3  # with the greedy answer 4 a problem: of MIXED the greedy one and the second sampled one are right
DATA = [EvaluationSetConfig("easy.jsonl"), EvaluationSetConfig("chance.jsonl")]
CONFIG = Config(evaluation=EvaluationConfig(k=K, sets=DATA), rollout=RolloutConfig(max_tokens=16))
SETS = {
    "easy": PromptSet([fake_prompt(kind, i) for i, kind in enumerate([RIGHT, RIGHT, MIXED, WRONG])], {"empty": 1, "too_long": 0}),
    "chance": PromptSet([fake_prompt(CHANCE, 10 + i) for i in range(7)]),
}
WANTED = {problem.key: problem.sampling.answers for problem in all_problems(SETS, CONFIG)}


@pytest.fixture(scope="module")
def judge():
    with Judge({}, "strict_box", workers=1, time_limit=1) as judge:
        yield judge


def run(engine: FakeEngine, judge: Judge, **more):
    return evaluate(engine, judge if engine.is_first else None, SETS, CONFIG, "step 3", **more)


def test_accuracies_by_hand(judge):
    result = run(FakeEngine(K + 1), judge)
    easy = result.summary["sets"]["easy"]
    assert easy["problems"] == 4 and easy["dropped"] == {"empty": 1}
    assert easy["greedy"] == 3 / 4
    assert easy[f"avg@{K}"] == pytest.approx((1 + 1 + 1 / 3 + 0) / 4)
    assert easy["pass@1"] == pytest.approx(easy[f"avg@{K}"]) and easy["pass@2"] == pytest.approx((1 + 1 + 2 / 3) / 4)
    assert easy[f"pass@{K}"] == pytest.approx(3 / 4)
    assert easy["outcomes"] == {"right": 3 + 2 * K + 1, "wrong": 16 - 10, "no_answer": 0, "timed_out": 0, "crashed": 0}
    assert easy["truncated_share"] == 4 / 16  # the fake's WRONG answers are as long as may be
    assert (easy["response_length_right"], easy["response_length_wrong"]) == ((2 * 8 + 3 * 2) / 10, (3 * 2 + 5 * 4) / 6)
    assert [row["correct"] for row in easy["by_problem"]] == [K, K, 1, 0] and easy["by_problem"][2]["greedy"] == 1.0
    assert easy["settings"] == {"greedy": True, "k": K, "temperature": 1.0, "top_p": 1.0, "max_tokens": 16, "reward": "strict_box"}
    assert result.metrics().keys() == {f"validation/{name}/{kind}" for name in SETS for kind in ("greedy", f"avg@{K}")}
    assert result.metrics()["validation/easy/greedy"] == 3 / 4
    mean = result.summary["mean"]["avg"]
    assert mean["value"] == pytest.approx((easy[f"avg@{K}"] + result.summary["sets"]["chance"][f"avg@{K}"]) / 2)
    assert mean["of"] == {"easy": f"avg@{K}", "chance": f"avg@{K}"} and mean["interval"][0] < mean["value"] < mean["interval"][1]


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (3, 1), (4, 2)])
def test_engines_share_the_problems_and_agree(ranks, tp, judge):
    alone = run(FakeEngine(K + 1), judge).summary
    together = on_ranks(ranks, K + 1, lambda engine: (run(engine, judge).summary, len(engine.requests)), tp)
    assert all(summary == alone for summary, _ in together)
    assert sum(number for _, number in together) == tp * (K + 1) * 11


def test_seeds_are_those_of_the_problem_and_sample_alone(judge):
    engines = [FakeEngine(K + 1), FakeEngine(K + 1)]
    for engine in engines:
        run(engine, judge)
    assert engines[0].requests == engines[1].requests
    sampled = [request for request in engines[0].requests if request.temperature > 0]
    assert len({request.seed for request in sampled}) == len(sampled) == K * 11
    assert answers_expected(engines[0], SETS, CONFIG) == len(engines[0].requests)


def test_each_set_has_its_own_settings(judge):
    own = EvaluationSetConfig("chance.jsonl", k=5, temperature=0.6, top_p=0.7, greedy=False, max_tokens=9)
    config = replace(CONFIG, evaluation=EvaluationConfig(k=1, sets=[DATA[0], own]))
    engine = FakeEngine(5)
    result = evaluate(engine, judge, SETS, config, "model")
    told = {(request.temperature, request.top_p, request.max_tokens) for request in engine.requests}
    assert told == {(0.0, 1.0, 16), (1.0, 1.0, 16), (0.6, 0.7, 9)}
    assert set(result.metrics()) == {"validation/easy/greedy", "validation/easy/avg@1", "validation/chance/avg@5"}
    chance = result.summary["sets"]["chance"]
    assert (chance["settings"]["temperature"], chance["settings"]["top_p"], chance["settings"]["k"]) == (0.6, 0.7, 5)
    assert result.summary["mean"].keys() == {"avg"}  # not every set has a greedy answer
    assert all(len(chance["by_problem"][i].keys() & {"n", "correct", "score", "greedy"}) == 3 for i in range(7))


def test_a_long_prompt_has_what_the_window_leaves():
    problem = all_problems(SETS, CONFIG)[0]
    assert {request.max_tokens for request in requests(problem, 1, (), window=10)} == {10 - len(problem.prompt.token_ids)}


@pytest.mark.parametrize("after", [1, 9, 21, 40])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_stopped_and_gone_on_is_never_stopped(after, every, judge, tmp_path):
    """Whole problems are kept, none is answered twice, and the numbers are the same; whether a file is written for each problem or at the
    end, and by another number of engines."""
    expected, finished = run(FakeEngine(K + 1), judge).summary, []

    def stop(*_):
        finished.append(1)
        if len(finished) == after:
            raise Stopped("asked")

    with pytest.raises(Stopped):
        run(FakeEngine(K + 1), judge, on_finish=stop, answers=Answers(tmp_path, every=every))
    there = kept.known(tmp_path, WANTED).done
    assert len(there) <= after / (K + 1) and (after < 30 or there)

    def go_on(engine: FakeEngine):
        return run(engine, judge, answers=Answers(tmp_path, kept.known(tmp_path, WANTED), engine.index, every)).summary, engine.requests

    parts = on_ranks(2, K + 1, go_on)
    assert all(summary == expected for summary, _ in parts)
    assert sum(len(asked) for _, asked in parts) == (K + 1) * (11 - len(there))
    assert kept.known(tmp_path, WANTED).done == WANTED.keys()
    engine = FakeEngine(K + 1)
    assert run(engine, judge, answers=Answers(tmp_path, kept.known(tmp_path, WANTED))).summary == expected and not engine.requests


class AllAtOnce:
    """A judge whose verdicts come together, with the last one that is asked for; those of some numbers are errors."""

    def __init__(self, bad: set[int]):
        self._bad, self._asked, self.spoilt = bad, [], set()

    def submit(self, response: str, prompt) -> Future:
        number = len(self._asked)
        self._asked.append(Future())
        self.spoilt |= {prompt.id} if number in self._bad else set()
        for i, future in enumerate(self._asked if number == (K + 1) * 11 - 1 else []):
            if i in self._bad:
                future.set_exception(UserError("a verdict is 7", "let it be 0 to 1"))
            else:
                future.set_result(Verdict(1.0, "right"))
        return self._asked[-1]


@pytest.mark.parametrize("bad", [{0}, {43}, {0, 4, 8, 12, 16}])
def test_a_bad_verdict_costs_no_other_problem(bad, tmp_path):
    judge = AllAtOnce(bad)
    with pytest.raises(UserError, match="a verdict is 7"):
        run(FakeEngine(K + 1), judge, answers=Answers(tmp_path))
    every = {problem.key: problem.prompt.id for problem in all_problems(SETS, CONFIG)}
    assert kept.known(tmp_path, WANTED).done == {key for key, name in every.items() if name not in judge.spoilt}
    assert 1 <= len(judge.spoilt) <= len(bad)


class Waiting(Future):
    """A verdict that comes when it is waited for."""

    def __init__(self, on_wait):
        super().__init__()
        self._on_wait = on_wait

    def result(self, timeout=None) -> Verdict:
        self._on_wait()
        return Verdict(0.0, "timed_out")


def test_what_is_judged_is_written_before_other_verdicts_are_waited_for(judge, tmp_path):
    written = []

    class Slow:
        def submit(self, response, prompt):
            wait = Waiting(lambda: written.append(len(kept.known(tmp_path, WANTED).done)))
            return wait if prompt.id == "set/1" else judge.submit(response, prompt)

    result = run(FakeEngine(K + 1), Slow(), answers=Answers(tmp_path, every=1e9))
    assert written == [10] * (K + 1) and result.summary["sets"]["easy"]["outcomes"]["timed_out"] == K + 1


def test_of_the_answers_nothing_stays_in_memory(judge):
    responses = []
    run(FakeEngine(K + 1), judge, on_finish=lambda _, response: responses.append(response))
    assert len(responses) == (K + 1) * 11 and not any(one.text or one.token_ids or one.logprobs for one in responses)


@pytest.mark.parametrize("change", ["lacks", "twice", "fewer"])
def test_results_of_other_than_all_problems_are_refused(change, judge, tmp_path):
    """As where the engines disagree on which are answered."""
    run(FakeEngine(K + 1), judge, answers=Answers(tmp_path))
    told = kept.known(tmp_path, WANTED).told
    sampled = next(one for one in told if one.kind == "sampled")
    others = [one for one in told if one is not sampled]
    wrong = {"lacks": others, "twice": [*told, sampled], "fewer": [*others, replace(sampled, scores=sampled.scores[1:])]}[change]
    summarise("m", told, SETS, CONFIG, {})
    with pytest.raises(RuntimeError, match=f"sampled answers to the . problems of {sampled.set} are not all there, or"):
        summarise("m", wrong, SETS, CONFIG, {})


def test_the_saved_answers_are_all_that_was_said(judge, tmp_path):
    run(FakeEngine(K + 1), judge, answers=Answers(tmp_path))
    rows = [row for file in kept.files(tmp_path) for row in kept.read(file)]
    assert len(rows) == (K + 1) * 11 and {row["kind"] for row in rows} == {"greedy", "sampled"}
    assert all(row["length"] == len(row["tokens"]) > 0 and row["response"].startswith("\\boxed{") and row["outcome"] for row in rows)


def test_the_file(judge, tmp_path):
    summary = run(FakeEngine(K + 1), judge).summary
    assert json.loads(write_results(tmp_path, "step_3", summary).read_text()) == json.loads(json.dumps(summary))

"""Async verdict functions: calls overlap, deadlines hold, and a call that takes its worker down takes no other call with it."""

from concurrent.futures import wait

import pytest

from megatron_nft.errors import UserError
from megatron_nft.rewards import Judge
from megatron_nft.trajectories import OUTCOMES, Prompt, Verdict

REMOTE = """
import asyncio, os, time

from megatron_nft.trajectories import Verdict

under_way = most = 0
barrier = []

async def remote(response, answer, prompt):
    what, _, number = response.partition(" ")
    if what == "meet":  # comes back only when so many calls are under way at a time
        barrier.append(number)
        while len(set(barrier)) < int(answer):
            await asyncio.sleep(0.01)
    if what == "most":
        global under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.05)
        under_way -= 1
        return Verdict(1.0, "right", str(most))
    if what == "sleep":
        await asyncio.sleep(60)
    if what == "deaf":
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    if what == "block":
        time.sleep(60)
    if what == "die":
        await asyncio.sleep(0.1)
        os._exit(3)
    if what == "raise":
        raise ValueError("no good")
    if what == "late":
        raise TimeoutError("of its own")
    if what == "slow":
        await asyncio.sleep(0.1)
    if what == "bad":
        return 1.5
    if what == "once":
        with open(answer, "a") as note:
            note.write("x")
        raise ConnectionError("out of reach")
    if what == "prompt":
        return Verdict(1.0, "right", f"{prompt['id']} {prompt['question']} {prompt['source']}")
    return float(response == answer)

def plain(response, answer, *, prompt):
    return Verdict(1.0, "right", prompt["question"])

def own_default(response, answer, tolerance=1e-6):
    return float(tolerance == 1e-6)
"""


def prompt(answer="7", question="3+4?", reward=None, *alternatives):
    return Prompt("1", question, answer, (), "sums", alternatives, reward)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(REMOTE)
    return str(path)


@pytest.fixture(scope="module")
def judge(path):
    with Judge((), f"{path}:remote", workers=1, time_limit=0.7, concurrency=8) as judge:
        yield judge


def outcomes(judge, responses, answer="7"):
    futures = [judge.submit(response, prompt(answer)) for response in responses]
    wait(futures, timeout=60)
    return [future.result(0).outcome for future in futures]


def test_calls_overlap(judge):
    assert outcomes(judge, [f"meet {n}" for n in range(8)], "8") == ["wrong"] * 8  # none would come back alone


def test_no_more_than_the_concurrency_are_under_way(judge):
    found = [judge.submit(f"most {n}", prompt()).result(30).found for n in range(1)]
    futures = [judge.submit(f"most {n}", prompt()) for n in range(1, 25)]
    assert found == ["1"] and max(int(future.result(30).found) for future in futures) == 8


def test_a_call_is_cancelled_at_its_deadline_and_the_worker_lives_on(judge):
    judge.take_counts()
    (worker,) = judge._async._workers
    assert outcomes(judge, ["1"]) == ["wrong"]
    process = worker._process
    assert outcomes(judge, ["sleep", "7", "raise", "late", "8"]) == ["timed_out", "right", "crashed", "crashed", "wrong"]
    assert worker._process is process and process.poll() is None
    assert judge.take_counts() == {"right": 1, "wrong": 2, "no_answer": 0, "timed_out": 1, "crashed": 2}


@pytest.mark.slow
def test_only_the_calls_that_take_the_worker_down_are_counted(judge, monkeypatch):
    monkeypatch.setattr("megatron_nft.rewards.asynchronous.GRACE", 0.2)
    asked = ["slow 1", "block", "deaf", "slow 2", "7"]
    assert outcomes(judge, asked) == ["wrong", "timed_out", "timed_out", "wrong", "right"]
    assert outcomes(judge, ["slow 3", "die", "slow 4"]) == ["wrong", "crashed", "wrong"]


def test_a_failure_is_asked_about_again_and_said_once(judge, tmp_path, caplog):
    judge._reported.clear()
    assert [outcomes(judge, ["once"], str(tmp_path / "calls"))[0] for _ in range(2)] == ["crashed"] * 2
    assert (tmp_path / "calls").read_text() == "xx"
    assert caplog.text.count("ConnectionError: out of reach") == 1


def test_a_number_outside_0_to_1_is_a_user_error(judge):
    with pytest.raises(UserError, match=r"returned '1.5'"):
        judge.submit("bad", prompt()).result(30)


def test_the_function_gets_the_prompt_it_names(judge, path):
    assert judge.submit("prompt", prompt(question="3+4?")).result(30).found == "1 3+4? sums"
    assert judge.submit("prompt", prompt(question="4+3?")).result(30).found == "1 4+3? sums"  # another call, not the cached one
    plain, own = f"{path}:plain", f"{path}:own_default"
    with Judge({plain, own, f"{path}:remote"}, "strict_box", workers=1, time_limit=5) as mixed:
        assert mixed.submit("x", prompt(reward=plain)).result(30).found == "3+4?"
        assert mixed.submit("x", prompt(reward=own)).result(30) == Verdict(1.0, "right")
        assert mixed.submit("9", prompt("7", "q", f"{path}:remote", "8", "9")).result(30).outcome == "right"


def test_close_lets_calls_end_and_cancels_those_that_wait(path):
    judge = Judge((), f"{path}:remote", workers=1, time_limit=2, concurrency=1)
    assert judge.submit("7", prompt()).result(30).outcome == "right"  # the worker is started
    slow, *waiting = [judge.submit(f"slow {n}", prompt()) for n in range(3)]
    (worker,) = judge._async._workers
    process = worker._process
    judge.close()
    assert slow.result(0).outcome == "wrong" and all(future.cancelled() for future in waiting)
    assert process.poll() is not None and judge.counts.keys() == set(OUTCOMES)

"""The judge with real worker processes: deadlines, deaths, counts, and what a worker is made of."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait

import pytest

from megatron_nft.config import Config, DataConfig, DatasetConfig, EvaluationConfig, EvaluationSetConfig
from megatron_nft.errors import UserError
from megatron_nft.rewards import Judge
from megatron_nft.rewards.judge import LONGEST_CACHED
from megatron_nft.trajectories import Prompt

USER = """
import os, subprocess, sys, time

from megatron_nft.trajectories import Verdict

def score(response, answer):
    print("a function may print")
    if response == "sleep":
        time.sleep(60)
    if response == "die":
        os._exit(3)
    if response == "leave":
        sys.exit(1)
    if response == "raise":
        raise ValueError("no good")
    if response == "child":
        child = subprocess.Popen(["sleep", "60"])
        open(answer, "w").write(str(child.pid))
        time.sleep(60)
    if response == "found":
        return Verdict(1.0, "right", 5)
    if response == "read":
        return float(sys.stdin.read() == "")
    if response == "memory":
        return float(len(bytearray(64 << 30)) > 0)
    if response == "modules":
        return float(not {"torch", "vllm", "megatron", "transformers", "sympy"} & set(sys.modules))
    if response == "same":
        return float(answer == "7")
    if response == "once":
        open(answer, "a").write("x")
        return 1.0
    return float(response)
"""


def prompt(answer="7", reward=None, *alternatives):
    return Prompt("1", "3+4?", answer, (), "sums", alternatives, reward)


@pytest.fixture(scope="module")
def user_function(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(USER)
    return f"{path}:score"


@pytest.fixture(scope="module")
def judge(user_function):
    with Judge({"math_verify", "strict_box"}, user_function, workers=1, time_limit=30) as judge:
        yield judge


@pytest.fixture(scope="module")
def hasty(user_function):
    """Its workers are light, so that those that are killed are soon replaced."""
    with Judge((), user_function, workers=2, time_limit=1) as judge:
        yield judge


def outcome(judge, response, answer="7", reward=None):
    return judge.submit(response, prompt(answer, reward)).result(timeout=30).outcome


def is_running(pid):
    """Whether the process exists and is not a zombie that nobody has reaped."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ends_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_the_prompt_chooses_the_function(judge):
    assert judge.submit("0.25", prompt()).result(30).score == 0.25
    assert outcome(judge, r"\boxed{0.5}", r"\frac12", "math_verify") == "right"
    with pytest.raises(UserError, match="prompt 1 wants the verdict function 'dapo', which no data set of the config names"):
        judge.submit("Answer: 7", prompt("7", "dapo"))


def test_the_config_names_the_functions(user_function, tmp_path):
    (tmp_path / "other.py").write_text("def half(response, answer):\n    return 0.5\n")
    half = f"{tmp_path}/other.py:half"
    train = [DatasetConfig(path="a.jsonl", reward="dapo"), DatasetConfig(path="b.jsonl", rewards={"x": user_function})]
    config = Config(data=DataConfig(train=train), evaluation=EvaluationConfig(sets=[EvaluationSetConfig(path="c", reward=half)]))
    config.reward.workers = 1
    with Judge.for_config(config) as judge:
        assert outcome(judge, "Answer: 7", "7", "dapo") == outcome(judge, r"\boxed{7}") == "right"
        assert [judge.submit("1", prompt("7", name)).result(30).score for name in (user_function, half)] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("function", "response"),
    [("strict_box", r"\boxed{7}"), ("math_verify", r"\boxed{7}"), ("math_verify", r"\boxed{\sqrt{49}}"), (None, "same")],
)
def test_any_of_several_golds_is_right(judge, function, response):
    assert judge.submit(response, prompt("8", function, r"\sqrt2", "7")).result(30).outcome == "right"
    assert judge.submit(response, prompt("8", function, r"\sqrt2", "9")).result(30).outcome == "wrong"


def test_a_function_that_sleeps_dies_leaves_or_raises_costs_one_answer_each(hasty, caplog):
    hasty.take_counts()
    futures = {name: hasty.submit(name, prompt()) for name in ("sleep", "die", "leave", "raise", "1", "0")}
    wait(futures.values(), timeout=30)
    assert {name: future.result().outcome for name, future in futures.items()} == {
        "sleep": "timed_out", "die": "crashed", "leave": "crashed", "raise": "crashed", "1": "right", "0": "wrong",
    }  # fmt: skip
    assert all(future.result().score == 0 for name, future in futures.items() if name != "1")
    assert hasty.take_counts() == {"right": 1, "wrong": 1, "no_answer": 0, "timed_out": 1, "crashed": 3}
    assert hasty.take_counts() == dict.fromkeys(hasty.counts, 0)
    assert len([record for record in caplog.records if "crashed" in record.getMessage()]) <= 1  # said once, then only counted


def test_the_first_crash_says_where(judge, caplog):
    judge._reported.clear()
    assert outcome(judge, "raise") == "crashed"
    assert "ValueError: no good" in caplog.text and "mine.py:" in caplog.text


def test_what_the_function_started_is_killed_with_it(hasty, tmp_path):
    note = tmp_path / "pid"
    assert outcome(hasty, "child", str(note)) == "timed_out"
    assert ends_within(int(note.read_text()), 5)


def test_a_number_outside_0_to_1_is_a_user_error(judge):
    with pytest.raises(UserError, match=r"returned '1.5' .float.: let it return a number from 0 to 1"):
        judge.submit("1.5", prompt()).result(30)
    with pytest.raises(UserError, match="found: a text or None"):
        judge.submit("found", prompt()).result(30)
    assert outcome(judge, "1") == "right"


def test_a_worker_is_light_bounded_in_memory_and_cut_off_from_the_input(hasty):
    assert outcome(hasty, "read") == "right"
    assert outcome(hasty, "memory") == "crashed"
    assert outcome(hasty, "modules") == "right"


def test_equal_answers_are_judged_once_and_counted_each_time(hasty, tmp_path):
    note = tmp_path / "calls"
    hasty.take_counts()
    futures = [hasty.submit("once", prompt(str(note))) for _ in range(20)]
    assert {future.result(30).score for future in futures} == {1.0}
    assert hasty.take_counts()["right"] == 20
    assert note.read_text() == "x"


def test_ten_megabytes_cost_one_answer_at_most(judge):
    long = "9" * 10_000_000
    assert outcome(judge, rf"\boxed{{{long}}}", r"\frac12", "math_verify") == "no_answer"  # it begins too early to be seen
    assert outcome(judge, rf"\boxed{{{long[:200_000]}}}", r"\frac12", "math_verify") == "wrong"
    assert outcome(judge, "\\boxed{" * 1_250_000, "7", "strict_box") == "no_answer"
    assert outcome(judge, "0" * 10_000_000, "7") in ("wrong", "timed_out")
    assert max(len(call.response) for call in judge._cache) <= LONGEST_CACHED
    assert outcome(judge, "1") == "right"


def test_text_of_any_kind_gets_through(judge):
    assert outcome(judge, "\ud800 \u2028 \n\x00 0", "7") == "crashed"  # float() of it raises in the function, not in the pipe
    assert outcome(judge, " 1\n") == "right"
    assert outcome(judge, "0" * 300_000) == "wrong"  # longer than the pipe's buffer


def test_strict_box_and_the_answer_line_need_no_worker():
    with Judge({"dapo"}, "strict_box", workers=2, time_limit=2) as judge:
        assert judge._workers == []
        for n in range(20):
            judge.submit(rf"so \boxed{{{n}}}", prompt())
            judge.submit(f"Answer: {n}", prompt(reward="dapo"))
        assert judge.take_counts() == {"right": 2, "wrong": 38, "no_answer": 0, "timed_out": 0, "crashed": 0}


def test_a_name_that_does_not_resolve_is_a_user_error_at_construction(user_function):
    with pytest.raises(UserError, match="has no function best"):
        Judge({user_function.replace(":score", ":best")}, "strict_box", workers=1, time_limit=2)
    with pytest.raises(UserError, match="there is no verdict function 'boxed'"):
        Judge((), "boxed", workers=1, time_limit=2)


def test_close_cancels_what_waits_and_ends_the_workers(user_function):
    judge = Judge((), user_function, workers=1, time_limit=1)
    pids = [worker._process.pid for worker in judge._workers]
    running, *waiting = [judge.submit("sleep", prompt(str(n))) for n in range(4)]
    start = time.monotonic()
    while not running.done() and time.monotonic() - start < 0.3:
        time.sleep(0.01)
    judge.close()
    assert running.result(5).outcome == "timed_out" and all(future.cancelled() for future in waiting)
    assert all(ends_within(pid, 5) for pid in pids)


def test_a_worker_killed_while_idle_is_replaced(user_function):
    with Judge((), user_function, workers=1, time_limit=5) as judge:
        os.kill(judge._workers[0]._process.pid, signal.SIGKILL)
        judge._workers[0]._process.wait()
        assert outcome(judge, "1") == "right"


def test_a_worker_that_dies_before_it_is_told_what_to_do_is_a_user_error(user_function, monkeypatch):
    start = subprocess.Popen

    def dead(command, **options):
        process = start(["false"], **options)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, so its input is a broken pipe
        return process

    monkeypatch.setattr(subprocess, "Popen", dead)
    with pytest.raises(UserError, match="loading the verdict functions .* failed .the worker process ended with exit status 1"):
        Judge((), user_function, workers=1, time_limit=2)


def test_workers_die_with_a_parent_that_is_killed(user_function):
    program = (
        "import time\n"
        "from megatron_nft.rewards import Judge\nfrom megatron_nft.trajectories import Prompt\n"
        f"judge = Judge((), {user_function!r}, workers=2, time_limit=100)\n"
        "judge.submit('sleep', Prompt('1', 'q', 'a', (), 's'))\n"
        "time.sleep(0.3)\n"
        "print(*[worker._process.pid for worker in judge._workers], flush=True)\ntime.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2 and all(map(is_running, pids))
        parent.kill()
        assert all(ends_within(pid, 5) for pid in pids)


def test_importing_the_rewards_needs_no_heavy_module():
    heavy = {"torch", "sympy", "numpy", "vllm", "megatron", "transformers"}
    check = f"import sys, megatron_nft.rewards; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.check_output([sys.executable, "-c", check], text=True, env=environment).strip() == "[]"

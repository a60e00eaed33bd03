"""A process that makes no progress is ended, and says where it hung, whoever holds the interpreter's lock."""

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_nft import watchdog
from megatron_nft.config.settings import PHASES
from megatron_nft.watchdog import EXIT_CODE, STUCK_EXIT_CODE, Watchdog
from tests.support import ROOT

HEAD = """
import ctypes, os, signal, sys, threading, time
from megatron_nft import watchdog
from megatron_nft.watchdog import Watchdog

def asleep_in_python():
    time.sleep(1000)

def asleep_in_c():
    ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock

def matching_long():
    import re
    re.match("(a+)+b", "a" * 60)  # as well

"""


def run(body: str) -> subprocess.CompletedProcess:
    """A program of its own; what hangs in it must be ended by the watchdog."""
    return subprocess.run([sys.executable, "-c", HEAD + body], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("hang", "code", "seconds"),
    [("asleep_in_python", EXIT_CODE, "1"), ("asleep_in_c", STUCK_EXIT_CODE, "0.5"), ("matching_long", STUCK_EXIT_CODE, "0.5")],
)
def test_a_phase_that_hangs_ends_the_process(tmp_path, hang, code, seconds):
    """Its line and the stacks stand in stderr and in a file of the run directory, which need not be there yet."""
    limits = {"asleep_in_python": 1, "asleep_in_c": 0.5, "matching_long": 0.5}
    done = run(f"with Watchdog(1000, 3, {str(tmp_path / 'run')!r}, {{'generate': {limits[hang]}}}):\n"
               f"    with watchdog.phase('generate'):\n        {hang}()")  # fmt: skip
    assert done.returncode == code and code not in (0, 2, 75, 130)
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"megatron-nft: rank 3: phase generate: no progress for {seconds} s")
    assert f" in {hang}\n" in done.stderr
    assert (tmp_path / "run" / "stacks-rank3.txt").read_text() == done.stderr


def test_all_threads_are_shown(tmp_path):
    done = run(f"threading.Thread(target=asleep_in_python, daemon=True).start()\n"
               f"with Watchdog(1, 0, {str(tmp_path)!r}):\n    threading.Event().wait()")  # fmt: skip
    assert done.returncode == EXIT_CODE and "phase start: no progress" in done.stderr
    assert " in asleep_in_python\n" in done.stderr and " in wait\n" in done.stderr


def test_a_full_disk_does_not_keep_it_alive(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(f"with Watchdog(1, 0, {str(tmp_path / 'file')!r}):\n    asleep_in_python()")
    assert done.returncode == EXIT_CODE and " in asleep_in_python\n" in done.stderr


def test_beats_phases_and_limits_of_phases(tmp_path):
    """What beats goes on; a phase begins anew with a limit of its own, 0 being none; the one around it goes on after it."""
    done = run(f"""
with Watchdog(1, 0, {str(tmp_path)!r}, {{"sync": 0}}):
    for _ in range(6):
        time.sleep(0.25)
        watchdog.beat()
    with watchdog.phase("sync"):
        time.sleep(1.5)
    for _ in range(6):
        with watchdog.phase("train"):
            time.sleep(0.25)
    watchdog.reach("end")
    print("alive", flush=True)
    with watchdog.phase("train"):
        pass
    asleep_in_python()
""")
    assert (done.stdout, done.returncode) == ("alive\n", EXIT_CODE)
    assert "phase end: no progress" in done.stderr


def test_a_beat_holds_for_a_whole_limit_in_c_as_well(tmp_path):
    """However long ago the one before it was: here the thread cannot look for most of a limit, twice."""
    done = run(f"""
with Watchdog(3, 0, {str(tmp_path)!r}):
    for _ in range(3):
        ctypes.PyDLL(None).usleep(1_700_000)
        watchdog.beat()
    print("alive")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", 0)


def test_it_leaves_nothing_behind(tmp_path):
    """Neither a timer that ends the process later, nor the helper, nor a file, nor a word."""
    done = run(f"""
with Watchdog(0.3, 0, {str(tmp_path)!r}) as it:
    pass
assert it._helper.returncode == 0 and threading.active_count() == 1
time.sleep(2)
watchdog.beat(); watchdog.reach("end")
with watchdog.phase("train"):
    print("alive")
""")
    assert (done.stdout, done.stderr, done.returncode, os.listdir(tmp_path)) == ("alive\n", "", 0, [])


def test_a_forked_child_is_not_watched_and_a_request_to_stop_is_heard(tmp_path):
    done = run(f"""
from megatron_nft.stopping import StopRequest
with StopRequest(1000) as stop, Watchdog(1, 0, {str(tmp_path)!r}):
    stop.begin()
    if not (child := os.fork()):
        with watchdog.phase("train"):
            time.sleep(2)
        os._exit(7)
    for _ in range(25):
        watchdog.beat()
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print("alive")
""")
    assert (done.stdout, done.stderr) == ("alive\n", "")


def test_without_the_helper_the_stacks_still_come(tmp_path):
    done = run(f"""
with Watchdog(1000, 0, {str(tmp_path)!r}, {{"train": 0.5}}) as it:
    it._helper.kill(); it._helper.wait()
    for _ in range(3):
        with watchdog.phase("sync"):
            pass
    with watchdog.phase("train"):
        asleep_in_c()
""")
    assert done.returncode == STUCK_EXIT_CODE and " in asleep_in_c\n" in done.stderr and "\0" not in done.stderr


def test_a_process_that_is_killed_is_told_of(tmp_path):
    """By the helper, at once: a forked child that is still there does not keep it waiting."""
    done = run(f"""
with Watchdog(1000, 5, {str(tmp_path)!r}):
    with watchdog.phase("train"):
        pass
    with watchdog.phase("generate"):
        if not os.fork():
            time.sleep(5)  # the helper may have to start first, on a machine that is busy
            os.write(2, b"the child ends\\n")
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
""")
    line = "megatron-nft: rank 5: phase generate: the process is gone: killed, or crashed outside of Python\n"
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, line + "the child ends\n")


@pytest.mark.parametrize("leave", ["watchdog.take_leave(); os._exit(3)", "sys.exit(3)"])
def test_a_process_that_leaves_by_itself_has_said_why(tmp_path, leave):
    done = run(f"with Watchdog(1000, 5, {str(tmp_path)!r}):\n    {leave}")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(
    ("limit", "phases", "minutes"), [(3600, {}, 90), (60, {"start": 7200}, 180), (600, {"train": 60}, 30), (0, {}, 30)]
)
def test_ranks_wait_longer_for_one_another_than_a_phase_may_take(limit, phases, minutes, tmp_path):
    assert watchdog.patience() == timedelta(minutes=30)  # torch's own
    with Watchdog(limit, 0, tmp_path, phases):
        assert watchdog.patience() == timedelta(minutes=minutes)


def test_the_phases_that_can_be_set_are_those_of_the_program():
    code = "".join(path.read_text() for path in Path(watchdog.__file__).parent.rglob("*.py"))
    stages = set(re.findall(r"log\.stage\(\"(\w+)\"\)|watchdog\.(?:phase|reach)\(\"(\w+)\"\)", code))
    assert {"start"} | {one or other for one, other in stages} == set(PHASES)


def test_it_imports_the_standard_library_alone():
    names = re.findall(r"^(?:import|from) (\w+)", Path(watchdog.__file__).read_text(), re.M)
    assert set(names) <= sys.stdlib_module_names


def test_limits():
    it = Watchdog(10, 0, ".", {"sync": 20})
    assert it.limit == 10
    it._names.append("sync")
    assert it.limit == 20

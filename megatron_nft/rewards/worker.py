"""The process that runs verdict functions: `python -m megatron_nft.rewards.worker`, started by process.py, which ends it.

JSON lines. In: first the list of function names, then one {function, response, answer} at a time. Out: "ready", then one reply
for each: {score, outcome}, {crash: text} when the function raised, or {user_error: [problem, mend]}.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from typing import TextIO

from megatron_nft.errors import UserError
from megatron_nft.rewards.functions import VerdictFunction, as_verdict, resolve
from megatron_nft.stopping import leave_to_parent

MEMORY_LIMIT = 4 << 30  # bytes of data: an answer such as 9^{9^{9^9}} must not take the machine's memory
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the input ends."""
    leave_to_parent()
    requests, replies = _private_pipes()
    _set_limits()
    try:
        functions = {name: resolve(name) for name in json.loads(requests.readline())}
        reply = "ready"
    except UserError as error:
        reply = _user_error(error)
    print(json.dumps(reply), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        reply = _judge(functions[request["function"]], **request)
        print(json.dumps(reply), file=replies, flush=True)


def _judge(call: VerdictFunction, function: str, response: str, answer: str) -> dict:
    """One reply. Whatever a verdict function raises is reported, never fatal."""
    try:
        verdict = as_verdict(call(response, answer), function)
    except UserError as error:
        return _user_error(error)
    except Exception as error:  # noqa: BLE001 - whatever the verdict function raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"crash": f"{type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"}
    return {"score": float(verdict.score), "outcome": verdict.outcome}


def _user_error(error: UserError) -> dict:
    return {"user_error": [error.problem, error.mend]}


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The two pipes, moved away from stdin and stdout, so that a function that prints or reads cannot disturb them."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return open(requests, encoding="utf-8"), open(replies, "w", encoding="utf-8")


def _set_limits() -> None:
    """Bound the memory; on Linux, die with the thread that started this process, even in the middle of a verdict."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()

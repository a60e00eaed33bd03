"""The process that runs verdict functions: `python -m megatron_nft.rewards.worker`, started by process.py, which ends it.

JSON lines. In: first {functions: names, memory_limit: bytes, time_limit: seconds}, then one call at a time {id, function, response,
answers, prompt}. Out: {ready: {name: its Kind}}, then a reply for each call: {id, score, outcome, found}, {id, crash: text} when the
function raised, or {user_error: [problem, mend]}. With a time_limit the functions are async ones, and many calls run at a time.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from dataclasses import asdict
from typing import TextIO

from megatron_nft.errors import UserError
from megatron_nft.rewards.boxed import LONGEST_FOUND
from megatron_nft.rewards.functions import Kind, VerdictFunction, as_verdict, best, kind_of, resolve
from megatron_nft.stopping import leave_to_parent
from megatron_nft.trajectories import Verdict

_PR_SET_PDEATHSIG = 1

Loaded = dict[str, tuple[VerdictFunction, Kind]]


def main() -> None:
    """Serve until the input ends."""
    leave_to_parent()
    requests, replies = _private_pipes()
    setup = json.loads(requests.readline())
    _set_limits(setup["memory_limit"])
    try:
        loaded = {name: (function, kind_of(function)) for name in setup["functions"] for function in [resolve(name)]}
    except UserError as error:
        send(replies, user_error(error))
        return
    send(replies, {"ready": {name: asdict(kind) for name, (_, kind) in loaded.items()}})
    if setup["time_limit"] is None:
        for line in requests:
            send(replies, _judge(loaded, json.loads(line)))
    else:
        from megatron_nft.rewards.async_worker import serve  # asyncio is not free to import

        serve(requests, replies, loaded, setup["time_limit"])


def send(replies: TextIO, reply: dict) -> None:
    """Write one line."""
    print(json.dumps(reply), file=replies, flush=True)


def prepared(loaded: Loaded, call: dict) -> tuple[VerdictFunction, dict]:
    """The function of a call, and what it takes besides response and answer."""
    function, kind = loaded[call["function"]]
    return function, {"prompt": call["prompt"]} if kind.takes_prompt else {}


def _judge(loaded: Loaded, call: dict) -> dict:
    """One reply: the best verdict over the gold answers. Whatever a verdict function raises is reported, never fatal."""
    function, extra = prepared(loaded, call)
    verdicts: list[Verdict] = []
    try:
        for answer in call["answers"]:
            verdicts.append(as_verdict(function(call["response"], answer, **extra), call["function"]))
            if verdicts[-1].score == 1.0:
                break
        return judged(best(verdicts))
    except UserError as error:
        return user_error(error)
    except Exception as error:  # noqa: BLE001 - whatever the verdict function raises
        return crashed(error)


def judged(verdict: Verdict) -> dict:
    """The reply of a verdict."""
    found = None if verdict.found is None else verdict.found[:LONGEST_FOUND]
    return {"score": float(verdict.score), "outcome": verdict.outcome, "found": found}


def crashed(error: BaseException) -> dict:
    """The reply of a function that raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return {"crash": f"{type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"}


def user_error(error: UserError) -> dict:
    """The reply where the user's function is not as it must be."""
    return {"user_error": [error.problem, error.mend]}


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The two pipes, moved away from stdin and stdout, so that a function that prints or reads cannot disturb them."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return open(requests, encoding="utf-8"), open(replies, "w", encoding="utf-8")


def _set_limits(memory: int) -> None:
    """Bound the memory (an answer such as 9^{9^{9^9}} must not take the machine's); on Linux, die with the thread that started this
    process, even in the middle of a verdict."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()

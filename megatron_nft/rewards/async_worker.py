"""The part of a worker process that runs async verdict functions: calls overlap, and each is cancelled at its deadline."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

from megatron_nft.errors import UserError
from megatron_nft.rewards.functions import as_verdict, best
from megatron_nft.rewards.worker import Loaded, crashed, judged, prepared, send, user_error
from megatron_nft.trajectories import Verdict


def serve(requests: TextIO, replies: TextIO, loaded: Loaded, time_limit: float) -> None:
    """Serve until the input ends. A call that is cancelled at its deadline is answered by {id, timed_out}.

    A function that blocks the event loop, or goes on when it is cancelled, does not come back; the parent sees that and ends the process.
    """
    asyncio.run(_serve(requests, replies, loaded, time_limit))


async def _serve(requests: TextIO, replies: TextIO, loaded: Loaded, time_limit: float) -> None:
    loop, reader = asyncio.get_running_loop(), ThreadPoolExecutor(1)  # a thread of its own: functions may keep the loop's busy
    under_way: set[asyncio.Task] = set()  # the loop itself holds tasks by weak references only
    while line := await loop.run_in_executor(reader, requests.readline):
        call = json.loads(line)
        task = loop.create_task(_answer(replies, loaded, call, time_limit))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


async def _answer(replies: TextIO, loaded: Loaded, call: dict, time_limit: float) -> None:
    deadline = asyncio.timeout(time_limit)
    try:
        async with deadline:
            reply = judged(await _judge(loaded, call))
    except UserError as error:
        reply = user_error(error)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever the verdict function raises
        reply = {"timed_out": True} if deadline.expired() else crashed(error)
    send(replies, {"id": call["id"]} | reply)


async def _judge(loaded: Loaded, call: dict) -> Verdict:
    """The best verdict over the gold answers, which are asked about one after the other."""
    function, extra = prepared(loaded, call)
    verdicts: list[Verdict] = []
    for answer in call["answers"]:
        verdicts.append(as_verdict(await function(call["response"], answer, **extra), call["function"]))
        if verdicts[-1].score == 1.0:
            break
    return best(verdicts)

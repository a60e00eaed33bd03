"""The client of all vLLM servers of a run. One process, the trainer's rank 0, has it; its connections live in a thread of their own.

A server is in the fleet when it has the current weights. One that dies, hangs or answers garbage is left out: what it was writing is lost,
and has to be sent again. It comes back in a sync, once it is healthy.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from itertools import cycle, islice
from typing import Any

import aiohttp

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.rollout import serving
from megatron_nft.rollout.member import Member
from megatron_nft.rollout.membership import TICK, Membership
from megatron_nft.rollout.remote import Answer, Fault, Refused
from megatron_nft.rollout.settings import Request
from megatron_nft.trajectories import Response
from megatron_nft.weights import Bucket

Found = tuple[int, int, Response]  # key, sample, response


class Inbox:
    """Where answers come back to: one for each who sends. `changed` is set when something has come, or a server has come or gone."""

    def __init__(self):
        self.finished: deque[Found] = deque()
        self.lost: deque[Found] = deque()
        self.changed = threading.Event()


class NoServer(Exception):
    """All servers are lost; a sync takes those in that have come back."""


class Fleet(Membership):
    """`send` answers to be written, `poll` those that are finished and ask for the `lost` ones; `sync` gives all servers new weights.
    All methods may be called from any thread; sync by one at a time."""

    def __init__(self, config: Config, model: dict[str, Any], decode: Callable[[list[int]], str], note: Callable[[str], None] = print):
        """Wait for rollout.served.count servers. model: the content of config.json; decode(token ids) gives an answer's text; note is told
        of every server that comes and goes.

        None is in before the first sync. Raises UserError where they are not there within rollout.served.start_timeout, or serve another
        model or another window.
        """
        super().__init__(config, model, note)
        self._decode, self._vocab_size, self.version = decode, model["vocab_size"], -1
        self._lock = threading.Lock()  # of the members, their answers and the inboxes
        self.inbox = Inbox()
        self._inboxes: list[Inbox] = [self.inbox]
        self._refused: Refused | None = None
        self._last: tuple[Inbox, int, Member] | None = None  # the last answer that was sent
        self._updated: list[Member] = []  # servers that take part in the update under way
        self._scored, self._asked = 0, time.monotonic()
        self.written = 0  # tokens that came so far
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._call(self._open())
        try:
            self._call(self._wait_for_servers())
        except BaseException:
            self.close()
            raise

    # ---- answers

    @property
    def free(self) -> int:
        """Slots that no answer takes, over all servers that are in."""
        with self._lock:
            return sum(max(member.slots - len(member.answers), 0) for member in self._in())

    @property
    def room(self) -> int:
        """Free slots of the server with the most of them, to which the next group goes."""
        with self._lock:
            return max((member.slots - len(member.answers) for member in self._in()), default=0)

    @property
    def members(self) -> list[str]:
        """Addresses of the servers that are in."""
        with self._lock:
            return [member.remote.address for member in self._in()]

    @property
    def rounds_head(self) -> bool:
        """Whether a server rounds its logits to 16 bits."""
        return any(member.rounds_head for member in self._members.values())

    def open_inbox(self) -> Inbox:
        """Another one, for answers that are none of the others' business."""
        inbox = Inbox()
        self._inboxes.append(inbox)
        return inbox

    def close_inbox(self, inbox: Inbox) -> None:
        """Give up what runs for it."""
        with self._lock:
            self._inboxes.remove(inbox)
            keys = {key for member in self._members.values() for owner, key, _ in member.answers if owner is inbox}
        self.abort(keys, inbox)

    def send(self, key: int, sample: int, request: Request, inbox: Inbox | None = None) -> None:
        """Have an answer written. What is sent in a row under one key goes to one server, that with the most free slots."""
        inbox = inbox or self.inbox
        answer = Answer(key, sample, request)
        with self._lock:
            members = self._in()
            if not members:
                inbox.lost.append((key, sample, answer.response(self._decode, self.version)))
                inbox.changed.set()
                return
            if self._last is not None and self._last[:2] == (inbox, key) and self._last[2].is_in:
                member = self._last[2]
            else:
                member = min(members, key=lambda member: len(member.answers) - member.slots)
            self._last = inbox, key, member
            if not member.answers:
                member.heard = time.monotonic()
            member.answers[inbox, key, sample] = answer
        self._loop.call_soon_threadsafe(self._start, member, (inbox, key, sample))

    def poll(self, inbox: Inbox | None = None) -> list[Found]:
        """Answers that have finished since the last call."""
        if self._refused is not None:
            raise RuntimeError(str(self._refused)) from self._refused
        with self._lock:
            return _all_of((inbox or self.inbox).finished)

    def lost(self, inbox: Inbox | None = None) -> list[Found]:
        """Answers whose server was left out since the last call, or gave them up for new weights, with what they had."""
        with self._lock:  # a server's answers are lost together
            return _all_of((inbox or self.inbox).lost)

    def abort(self, keys: Iterable[int], inbox: Inbox | None = None) -> None:
        """Give up what runs under these keys: nothing more is heard of it."""
        mine = {(inbox or self.inbox, key) for key in keys}
        if not mine:
            return
        with self._lock:
            given_up = [member.answers.pop(at) for member in self._members.values() for at in list(member.answers) if at[:2] in mine]
        self._cancel(given_up)

    def withdraw(self, keys: set[int]) -> list[Found]:
        """Give up what runs under these keys of what was sent without an inbox, and what there was of it."""
        return self._call(self._withdraw(keys))

    def running(self) -> int:
        """Answers that are being written."""
        with self._lock:
            return sum(len(member.answers) for member in self._in())

    def so_far(self) -> dict[tuple[int, int], Response]:
        """{(key, sample): what there is of it} of what was sent without an inbox and is being written."""
        return self._call(self._so_far())

    def token_logprobs(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-prob of every token given those before it, at temperature 1: one list for each sequence, shorter by one than the sequence.
        Raises NoServer where none is in.

        The sequences are dealt to the servers, and the next call begins with the next server: each is asked in its turn.
        """
        with self._lock:
            members = self._in()
        if not members:
            raise NoServer
        first, timeout = self._scored % len(members), float(self._settings.token_timeout)
        self._scored += len(token_ids)
        dealt = zip(islice(cycle(members), first, None), token_ids)
        return self._call(self._score([(member, list(ids)) for member, ids in dealt], timeout))

    # ---- weights

    def sync(self, buckets: Iterable[Bucket], version: int, names: frozenset[str]) -> None:
        """Give all servers new weights: buckets of full tensors under their Hugging Face names, all of `names`. Servers that are healthy
        again come in; one that fails is left out, and the others go on. Raises RuntimeError for a stream that leaves tensors out, UserError
        where no server is there."""
        timeout = self._settings.start_timeout
        if not self.prepare(timeout):
            raise UserError(f"no server was there for {timeout} s", "see what the servers wrote, and start them again")
        self.send_weights(buckets, names)
        self.finish(version)

    def prepare(self, seconds: float) -> bool:
        """The first part of sync: the servers stop writing. Whether there is one; where there is none it waits so long."""
        self._updated = self._call(self._begin_update(seconds))
        return bool(self._updated)

    def send_weights(self, buckets: Iterable[Bucket], names: frozenset[str]) -> None:
        """The second part: the stream is taken to its end, even where no server is left to take it."""
        missing = set(names)
        for bucket in buckets:
            tensors = list(bucket.tensors())
            missing.difference_update(name for name, _ in tensors)
            self._updated = self._call(self._send_tensors(self._updated, tensors))
            del bucket, tensors  # its memory may be used for the next one
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are missing from the weight stream, e.g. {min(missing)}")

    def finish(self, version: int) -> bool:
        """The last part: the servers go on, with the new weights. False where none is left that could."""
        self.version = version
        self._call(self._end_update(self._updated, version))
        return bool(self.members)

    def waiting(self) -> bool:
        """Whether a healthy server waits for weights: the next sync takes it in. Asks the servers, for seconds where one is silent."""
        return self._call(self._look_for_more())

    # ---- the servers

    def statistics(self) -> dict[str, float]:
        """Of the time since the last call: tokens per second of each server, and shares of time and slots that went unused; and what each
        server has to do now."""
        return self._call(self._statistics())

    def close(self) -> None:
        """Give up what runs, and leave the servers as they are."""
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _in(self) -> list[Member]:
        return [member for member in self._members.values() if member.is_in]

    def _call(self, coroutine: Coroutine) -> Any:
        """What a coroutine returns, run in the fleet's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> None:
        # A connection for each call: a server closes an idle one after some seconds, and a call that meets that looks like a dead server.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), read_bufsize=2**20)
        self._watching = asyncio.create_task(self._watch())

    async def _shut(self) -> None:
        self._watching.cancel()
        for member in list(self._members.values()):
            self._let_go(member)
        await asyncio.sleep(0)
        await self._session.close()

    async def _watch(self) -> None:
        """Leave out a server that has answers to write and writes none."""
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for member in self._in():
                member.looks += 1
                member.idle += member.paused or not member.answers
                member.used += 0 if member.paused else min(len(member.answers) / member.slots, 1)
                if member.answers and not member.paused and now - member.heard > self._settings.token_timeout:
                    self._leave_out(member, f"no token within {self._settings.token_timeout} s")

    async def _statistics(self) -> dict[str, float]:
        members, now = self._in(), time.monotonic()
        seconds, self._asked = max(now - self._asked, 1e-9), now
        found = {"servers": len(members), "idle_share": 0.0, "slots_used": 0.0}
        loads = await asyncio.gather(*(member.remote.load() for member in members), return_exceptions=True)
        for number, (member, load) in enumerate(zip(members, loads)):
            own = {"generated_tokens_per_second": member.tokens / seconds}
            if not isinstance(load, BaseException):  # a server that does not tell is found out by what it does not write
                own |= load | {"preempted": load["preempted"] - member.preempted}
                member.preempted = load["preempted"]
            found |= {f"server_{number}/{name}": value for name, value in own.items()}
            found["idle_share"] += member.idle / max(member.looks, 1) / len(members)
            found["slots_used"] += member.used / max(member.looks, 1) / len(members)
            member.tokens = member.looks = member.idle = 0
            member.used = 0.0
        return found

    async def _score(self, dealt: list[tuple[Member, list[int]]], timeout: float) -> list[list[float]]:
        async def one(member: Member, ids: list[int]) -> list[float]:
            try:
                return await member.remote.score(ids, timeout)
            except Fault as fault:
                self._leave_out(member, str(fault))
            if not (others := self._in()):
                raise NoServer
            return await one(others[0], ids)

        scores = await asyncio.gather(*(one(member, ids) for member, ids in dealt))
        await self._each(self._in(), lambda member: member.reset_cache(timeout))
        return scores

    async def _so_far(self) -> dict[tuple[int, int], Response]:
        with self._lock:
            pairs = [(member.version, at, answer) for member in self._members.values() for at, answer in member.answers.items()]
        return {at[1:]: answer.response(self._decode, version) for version, at, answer in pairs if at[0] is self.inbox}

    async def _withdraw(self, keys: set[int]) -> list[Found]:
        with self._lock:
            at = [(member, at) for member in self._members.values() for at in member.answers if at[0] is self.inbox and at[1] in keys]
            found = [(member.version, member.answers.pop(key)) for member, key in at]
        self._cancel([answer for _, answer in found])
        return [(answer.key, answer.sample, answer.response(self._decode, version)) for version, answer in found]

    # ---- answers, in the fleet's thread

    def _start(self, member: Member, at: tuple) -> None:
        with self._lock:
            answer = member.answers.get(at)
            if answer is not None and answer.task is None:  # not lost or given up by now
                answer.task = self._loop.create_task(self._write(member, at, answer))

    async def _write(self, member: Member, at: tuple, answer: Answer) -> None:
        def heard(tokens: int) -> int:
            member.heard = time.monotonic()
            member.tokens += tokens
            self.written += tokens
            return member.version

        try:
            await member.remote.stream(answer, self._vocab_size, heard)
        except Refused as refused:
            self._refused = refused
            self._tell_all()
        except Fault as fault:
            self._leave_out(member, str(fault))
        else:
            self._settle(member, at, answer)

    def _settle(self, member: Member, at: tuple, answer: Answer) -> None:
        response = answer.response(self._decode, member.version)
        with self._lock:
            if member.answers.get(at) is not answer:
                return  # given up meanwhile
            del member.answers[at]
            inbox: Inbox = at[0]
            (inbox.lost if response.finish_reason == "unfinished" else inbox.finished).append((answer.key, answer.sample, response))
        inbox.changed.set()

    def _leave_out(self, member: Member, why: str) -> None:
        """A server failed. What it was writing is lost; whoever watches over it starts it anew, where it lives still."""
        if self._members.get(member.remote.address) is not member:
            return
        count = self._let_go(member)
        serving.ask_for_restart(self._config.run_dir, member.name, member.remote.address)
        self._note(f"server {member.remote.address} is left out ({why}); {count} answers are sent again")
        self._tell_all()

    def _let_go(self, member: Member) -> int:
        """Forget a server; how many answers are lost with it."""
        with self._lock:
            member.is_in = False
            self._members.pop(member.remote.address, None)
            answers = dict(member.answers)
            member.answers.clear()
            for (inbox, key, sample), answer in answers.items():
                inbox.lost.append((key, sample, answer.response(self._decode, member.version)))
        self._cancel(list(answers.values()))
        if member.busy is not None:
            member.busy.cancel()
        if member.link is not None:
            threading.Thread(target=member.link.close, daemon=True).start()  # a hung transfer may not let go
        return len(answers)

    def _tell_all(self) -> None:
        for inbox in self._inboxes:
            inbox.changed.set()

    def _cancel(self, answers: list[Answer]) -> None:
        """Close the connections of answers that nobody waits for; the server stops writing them. From any thread."""

        def cancel() -> None:
            for answer in answers:
                if answer.task is not None:
                    answer.task.cancel()

        self._loop.call_soon_threadsafe(cancel)


def _all_of(waiting: deque[Found]) -> list[Found]:
    return [waiting.popleft() for _ in range(len(waiting))]

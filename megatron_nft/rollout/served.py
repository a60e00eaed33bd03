"""rollout.mode served: vLLM servers write the answers, on GPUs of their own, while the trainer trains.

Rank 0 has the client of the servers, the queue and a thread that drives both; the other ranks wait for what it says. What fails there is
raised on every rank.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_nft import watchdog
from megatron_nft.checksums import Checksum
from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.rollout.fleet import Fleet, Inbox, NoServer
from megatron_nft.rollout.settings import Request, set_environment
from megatron_nft.stopping import Stopped
from megatron_nft.trajectories import Prompt, Response
from megatron_nft.weights import Bucket, load_weights, read_json

PERIOD = 1.0  # seconds that rank 0 waits until it asks whether the run is to stop
_DONE, _GO_ON, _RENEW = range(3)
T = TypeVar("T")


class ServedEngine:
    """All servers together as one engine, with the interface of rollout.Engine; its methods are collective, too.

    `weights` gives the trainer's current weights, a collective: servers that come back when none is left get them within a step.
    """

    count, index = 1, 0
    shows_tensors = False  # servers are checked by their log-probs alone

    def __init__(
        self,
        config: Config,
        weights: Callable[[], Iterator[Bucket]],
        asked_to_stop: Callable[[], bool] | None = None,
        note: Callable[[str], None] = print,
    ):
        """Wait for the servers. Raises UserError, on all ranks, where they are not there in time or serve another model."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.is_first = world == 1 or dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo", timeout=watchdog.patience()) if world > 1 else None
        self._weights, self._asked_to_stop, self._timeout = weights, asked_to_stop, config.rollout.served.start_timeout
        self.weight_version = 0
        self.names = frozenset(load_weights(config.model.path).names())
        self._tokenizer = AutoTokenizer.from_pretrained(config.model.path, local_files_only=True)
        self.fleet: Fleet | None = None

        def start() -> bool:
            set_environment(config.rollout)
            self.fleet = Fleet(config, read_json(Path(config.model.path) / "config.json"), self.decode, note)
            return self.fleet.rounds_head

        self.rounds_head = self.of_first(start)

    # ---- answers

    def generate(self, requests: list[Request], on_finish: Callable[[int, Response], None] | None = None) -> list[Response]:
        """Sample a Response for each request, in the order of the requests, beside what else is being written; [] on all ranks but the
        first. on_finish(index, response) is called there as they finish. Raises Stopped where the run is asked to stop."""
        job = _Job(self.fleet, requests, on_finish) if self.is_first else None
        try:
            self.until(lambda: job.go_on(PERIOD))
        finally:
            if job is not None:
                job.end()
        return job.responses if job is not None else []

    def token_logprobs(self, token_ids: list[list[int]]) -> list[list[float]]:
        """As Engine.token_logprobs; the sequences are dealt to the servers."""

        def ask() -> list[list[float]] | None:
            try:
                return self.fleet.token_logprobs(token_ids)
            except NoServer:
                return None

        while (found := self.of_first(ask)) is None:
            if not self.sync(self._weights(), self.weight_version):
                time.sleep(
                    PERIOD
                )  # the run is to stop, but not here, where the step is half done: it ends with its grace time at the latest
        return found

    def decode(self, token_ids: list[int]) -> str:
        """As text, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective call."""
        return self._asked_to_stop is not None and self._asked_to_stop()

    def until(self, done: Callable[[], bool]) -> None:
        """Wait until done() is true, which only the first rank asks and which may take a second. New weights are sent meanwhile where all
        servers were lost and one is back. Raises Stopped where the run is asked to stop.

        Tokens that come are beats for the watchdogs of all ranks, and so are looks for a server, whose number has an end of its own."""
        alone_since: list[float] = []
        beaten = -1.0

        def state() -> int:
            if done():
                return _DONE
            if self.fleet.members:
                alone_since.clear()
                return _GO_ON
            alone_since[:] = alone_since or [time.monotonic()]
            if self.fleet.waiting():
                return _RENEW
            if time.monotonic() - alone_since[0] > self._timeout:
                raise UserError(f"no server has come back within {self._timeout} s", "see what the servers wrote, and start them again")
            time.sleep(PERIOD)
            return _GO_ON

        def told() -> tuple[int, float]:
            found = state()
            return found, time.monotonic() if alone_since else self.fleet.written

        while (now := self.of_first(told))[0] != _DONE:
            found, mark = now
            if mark != beaten:
                watchdog.beat()
                beaten = mark
            if self.asked_to_stop():
                raise Stopped("stopped on request while answers were sampled")
            if found == _RENEW:
                self.sync(self._weights(), self.weight_version)

    # ---- weights

    def sync(self, buckets: Iterator[Bucket], version: int) -> bool:
        """New weights for all servers: as Engine.sync. Where none of them came through, it is made again when one is back. False where the
        run is asked to stop before a server is there: no weights are sent then."""
        end = time.monotonic() + self._timeout

        def prepare() -> bool:
            if self.fleet.prepare(PERIOD):
                return True
            if time.monotonic() > end:
                raise UserError(f"no server was there for {self._timeout} s", "see what the servers wrote, and start them again")
            return False

        while not self.of_first(prepare):
            watchdog.beat()
            if self.asked_to_stop():
                return False
        if self.is_first:
            self.fleet.send_weights(buckets, self.names)
        else:
            for bucket in buckets:
                del bucket
        self.weight_version = version
        return self.of_first(lambda: self.fleet.finish(version)) or self.sync(self._weights(), version)

    def checksums(self) -> dict[frozenset[str], Checksum]:
        """None: the servers are checked by their log-probs."""
        return {}

    def differing(self, weights: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
        """None is compared; the stream is taken to its end."""
        for _ in weights:
            pass
        return []

    def sleep(self, level: int = 2) -> None:
        """Nothing: the servers have memory of their own."""

    def wake(self) -> None:
        """Nothing, as sleep."""

    def scale_cache_by(self, prompts: list[Prompt]) -> None:
        """Nothing: a server's FP8 cache keeps the scales that vLLM gives it."""

    # ---- ranks

    def gather(self, value: T) -> list[T]:
        """[the first rank's value], on every rank."""
        return [self.of_first(lambda: value)]

    def of_first(self, function: Callable[[], T]) -> T:
        """What function() returns on the first rank, on every rank; what it raises is raised on every rank."""
        told: list[Any] = [None]
        error: Exception | None = None
        if self.is_first:
            try:
                told = [("result", function())]
            except Exception as caught:  # raised below, once the others know
                user = isinstance(caught, UserError)
                error, told = caught, [("wrong", caught.problem, caught.mend) if user else ("fault", f"{type(caught).__name__}: {caught}")]
        if self._group is not None:
            dist.broadcast_object_list(told, src=0, group=self._group)
        if error is not None:
            raise error
        kind, *content = told[0]
        if kind == "wrong":
            raise UserError(*content)
        if kind == "fault":
            raise RuntimeError(f"rank 0: {content[0]}")
        return content[0]

    def close(self) -> None:
        """Let go of the servers; they stay as they are."""
        if self.fleet is not None:
            self.fleet.close()


class _Job:
    """Answers that one caller waits for, written beside the others."""

    def __init__(self, fleet: Fleet, requests: list[Request], on_finish: Callable[[int, Response], None] | None):
        self._fleet, self._requests, self._on_finish = fleet, requests, on_finish
        self._inbox: Inbox = fleet.open_inbox()
        self._to_send = list(range(len(requests)))[::-1]
        self._missing = len(requests)
        self.responses: list[Response | None] = [None] * len(requests)

    def go_on(self, seconds: float) -> bool:
        """Send and take what there is, for so long at most; whether all is there."""
        end = time.monotonic() + seconds
        while self._missing and time.monotonic() < end:
            while self._to_send and self._fleet.free:
                index = self._to_send.pop()
                self._fleet.send(index, 0, self._requests[index], self._inbox)
            self._inbox.changed.wait(min(seconds, 0.1))
            self._inbox.changed.clear()
            self._to_send += [index for index, _, _ in self._fleet.lost(self._inbox)]
            for index, _, response in self._fleet.poll(self._inbox):
                self.responses[index], self._missing = response, self._missing - 1
                if self._on_finish is not None:
                    self._on_finish(index, response)
        return not self._missing

    def end(self) -> None:
        """Give up what still runs."""
        self._fleet.close_inbox(self._inbox)

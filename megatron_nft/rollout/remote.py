"""One vLLM server, as its client has it: calls over HTTP, the stream of an answer, and whether what comes can be an answer at all."""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megatron_nft.rollout.settings import Request, sampling
from megatron_nft.trajectories import Response

QUICK = 10.0  # seconds for a call that changes nothing
NOT_A_NUMBER = -9999.0  # what a vLLM server writes for a log-prob that it has not, or that is none
ROUNDING = 1e-3  # log-probs may be above zero by so much: a fused kernel rounds
FINISHED = ("stop", "length")


class Fault(Exception):
    """The server is dead, hangs or answers garbage: it must not be used as it is."""


class Refused(Exception):
    """The server says that what it was sent is wrong: a fault of ours."""


@dataclass
class Answer:
    """One answer, as far as it has come."""

    key: int
    sample: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)  # (first token, weight version), in order
    finish_reason: str | None = None  # as the server has it; None: it has not finished
    task: asyncio.Task | None = None

    def add(self, choice: dict[str, Any], version: int, vocab_size: int) -> None:
        """Take the next tokens of a stream, which came while the server had weights of this version. Raises Fault for garbage."""
        token_ids = choice["token_ids"] or []
        content = (choice["logprobs"] or {}).get("content") or []
        logprobs = [entry["logprob"] for entry in content]
        _check(token_ids, logprobs, [entry["token_id"] for entry in content], vocab_size)
        if token_ids and (not self.starts or self.starts[-1][1] != version):
            self.starts.append((len(self.token_ids), version))
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.finish_reason = choice["finish_reason"]
        if len(self.token_ids) > self.request.max_tokens:
            raise Fault(f"{len(self.token_ids)} tokens where {self.request.max_tokens} were asked for")
        if self.finish_reason not in (None, "abort", *FINISHED):
            raise Fault(f"an answer ended with {self.finish_reason!r}")
        if self.finish_reason in FINISHED and not self.token_ids:
            raise Fault("an answer without a token")
        if spans := choice.get("weight_versions"):  # at the end; vLLM 0.26 knows none, and what was noted on arrival stands
            self.starts = [(int(span["start"]), int(span["version"])) for span in spans]

    def response(self, decode: Callable[[list[int]], str], version: int) -> Response:
        """As a Response, "unfinished" and without its text where it has not finished; `version` is that of an answer without a token."""
        reason = self.finish_reason if self.finish_reason in FINISHED else "unfinished"
        first, later = (self.starts[0][1] if self.starts else version), self.starts[1:]
        text = decode(self.token_ids) if reason in FINISHED else ""  # thousands of long ones at a time, and nobody reads them
        return Response(list(self.token_ids), list(self.logprobs), reason, first, text, later_versions=later or None)


def _check(token_ids: list, logprobs: list, of: list, vocab_size: int) -> None:
    """Raise Fault for tokens that no model can have written."""
    if set(map(type, token_ids)) - {int} or (token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size):
        raise Fault(f"token ids out of the vocabulary of {vocab_size}")
    if of != token_ids:
        raise Fault(f"{len(logprobs)} log-probs that are not those of the {len(token_ids)} tokens")
    if not all(type(value) in (int, float) and math.isfinite(value) and NOT_A_NUMBER < value <= ROUNDING for value in logprobs):
        raise Fault("log-probs that are no finite numbers below zero")


class Remote:
    """A server at an address, http://host:port. Every call raises Fault where the server does not do it, Refused where it says that it
    was asked something wrong."""

    def __init__(self, session: aiohttp.ClientSession, address: str):
        self._session, self.address = session, address.rstrip("/")

    async def call(self, path: str, body: dict | None = None, timeout: float | None = QUICK, get: bool = False) -> Any:
        """POST (or GET) and what comes back: JSON, or text. timeout in seconds; None: as long as it takes."""
        method, limit = ("GET" if get else "POST"), aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.request(method, f"{self.address}/{path}", json=body, timeout=limit) as reply:
                text = await reply.text()
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError) as error:
            raise Fault(f"/{path}: {_what(error)}") from error
        if 400 <= reply.status < 500:
            raise Refused(f"{self.address}/{path}: {reply.status} {text[:300]}")
        if reply.status != 200:
            raise Fault(f"/{path}: {reply.status} {text[:300]}")
        if reply.content_type != "application/json":
            return text
        try:
            return json.loads(text)
        except ValueError:
            raise Fault(f"/{path}: garbage instead of JSON") from None

    async def rpc(self, method: str) -> Any:
        """Of a method of the server's workers, what the first one returns."""
        reply = await self.call("collective_rpc", {"method": method})
        try:
            return reply["results"][0]
        except (KeyError, IndexError, TypeError):
            raise Fault(f"/collective_rpc of {method}: no result") from None

    async def stream(self, answer: Answer, vocab_size: int, heard: Callable[[int], int]) -> None:
        """Have an answer written to its end. heard(tokens) is called as they come, and says which weights the server has."""
        request = answer.request
        body = {"token_ids": list(request.token_ids), "sampling_params": sampling(request), "stream": True}
        url, limit = f"{self.address}/inference/v1/generate", aiohttp.ClientTimeout(total=None)
        try:
            async with self._session.post(url, json=body, timeout=limit) as reply:
                if reply.status != 200:
                    self._raise(reply.status, await reply.text())
                async for line in reply.content:
                    if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                        self._take(answer, json.loads(line[6:]), vocab_size, heard)
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(f"an answer broke off: {_what(error)}") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Fault(f"garbage: {_what(error)}") from error
        if answer.finish_reason is None:
            raise Fault("an answer broke off")

    def _take(self, answer: Answer, chunk: dict, vocab_size: int, heard: Callable[[int], int]) -> None:
        if "error" in chunk:
            self._raise(chunk["error"]["code"], chunk["error"]["message"])
        for choice in chunk["choices"]:
            answer.add(choice, heard(len(choice["token_ids"] or [])), vocab_size)

    def _raise(self, status: int, text: str) -> None:
        if 400 <= status < 500:
            raise Refused(f"{self.address}/inference/v1/generate: {text[:300]}")
        raise Fault(f"/inference/v1/generate: {status} {text[:300]}")

    async def score(self, token_ids: list[int], timeout: float) -> list[float]:
        """Log-prob of every token but the first given those before it, at temperature 1."""
        params = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        reply = await self.call("inference/v1/generate", {"token_ids": token_ids, "sampling_params": params}, timeout)
        try:
            return [row[str(token)]["logprob"] for token, row in zip(token_ids[1:], reply["prompt_logprobs"][1:], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise Fault(f"garbage for log-probs: {_what(error)}") from None

    async def load(self) -> dict[str, float]:
        """Requests that run and wait, and how often one was preempted so far."""
        names = {"num_requests_running": "running", "num_requests_waiting": "waiting", "num_preemptions_total": "preempted"}
        found = dict.fromkeys(names.values(), 0.0)
        for line in (await self.call("metrics", get=True)).splitlines():
            name, _, rest = line.partition("{")
            if (short := names.get(name.removeprefix("vllm:"))) and name.startswith("vllm:"):
                found[short] += float(rest.rpartition(" ")[2])
        return found


def _what(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip()

"""vLLM servers without vLLM: in threads of this process, with the routes that the fleet's client uses, and faults on demand."""

import asyncio
import json
import threading
import time
from typing import Self

from aiohttp import web

PROMPT = 2  # tokens of a prompt
DESCRIPTION = {
    "model": {"model_type": "qwen2", "vocab_size": 50, "hidden_size": 8},
    "max_model_len": 40,
    "max_num_seqs": 4,
    "logprobs_mode": "processed_logprobs",
    "backend": "megatron_nft_gloo",
    "workers": 1,
    "rounds_head": False,
}


class FakeServer:
    """Answers are the prompt's last token counted up, one token a chunk. `fault` says what goes wrong with the next ones: None | hang |
    die | refuse | transfer | idle (a connection is closed as its second call comes) | a key of `choices`. version None is a vLLM that
    does not tell it. stop() closes what runs."""

    def __init__(self, **described):
        self.described, self.fault, self.port = DESCRIPTION | described, None, 0
        self.version, self.names, self.calls, self.requests, self.seen = "default", [], [], [], 0
        self.gate = threading.Event()  # closed: answers stand after their first token
        self.gate.set()
        self._connections = set()
        self.paused, self.length = False, 100  # length: tokens of an answer, where max_tokens lets it

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.gate.set()
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; the second time at the same port, with the weights of the start."""
        self.version, self.paused = "default", False
        self.described |= {"instance": f"start {time.monotonic()}"}
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)

    def stop(self) -> None:
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
            self._runner = None

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/{call}", self._call)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text='# a comment\nvllm:num_requests_running{engine="0"} 2.0\nvllm:num_preemptions_total{engine="0"} 3.0\n')

    async def _call(self, request: web.Request) -> web.Response:
        body, call = (json.loads(await request.text() or "null")), request.match_info["call"]
        if self.fault == "idle" and request.protocol in self._connections:
            request.transport.abort()
        self._connections.add(request.protocol)
        self.calls.append(call)
        if call == "collective_rpc":
            return web.json_response({"results": [self.described]})
        if call == "update_weights":
            if self.fault == "transfer":
                return web.json_response({}, status=500)
            self.names += body["update_info"]["names"]
        if call == "finish_weight_update":
            self.version = body["weight_version"]
        if call in ("pause", "resume"):
            self.paused = call == "pause"
        return web.json_response({"success": True})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        if self.fault == "refuse":
            return web.json_response({"error": "no"}, status=400)
        reply = web.StreamResponse()
        await reply.prepare(request)
        last, most = body["token_ids"][-1], body["sampling_params"]["max_tokens"]
        length = min(self.length - (len(body["token_ids"]) - PROMPT), most)  # what is resumed has been begun
        for number in range(length):
            while self.paused or (number and not self.gate.is_set()) or self.fault == "hang":
                await asyncio.sleep(0.01)
            if self.fault == "die" and number:
                request.transport.abort()
                return reply
            choice = self._choice(number, last + number + 1, length, "length" if length == most else "stop")
            await reply.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        await reply.write(b"data: [DONE]\n\n")
        return reply

    def _choice(self, number: int, token: int, length: int, reason: str) -> dict:
        last = number == length - 1
        choice = {"token_ids": [token], "finish_reason": reason if last else None, "weight_versions": None,
                  "logprobs": {"content": [{"token_id": token, "logprob": -0.5}]}}  # fmt: skip
        if last and self.version is not None:
            choice["weight_versions"] = [{"version": self.version, "start": 0, "end": length}]
        return choice | self.choices(token).get(self.fault, {})

    @staticmethod
    def choices(token: int) -> dict[str, dict]:
        """Faults of an answer, and what is wrong with it then."""
        content = [{"token_id": token, "logprob": -0.5}]
        return {
            "out of the vocabulary": {"token_ids": [50], "logprobs": {"content": [{"token_id": 50, "logprob": -0.5}]}},
            "no integer": {"token_ids": [1.5], "logprobs": {"content": [{"token_id": 1.5, "logprob": -0.5}]}},
            "too few log-probs": {"logprobs": {"content": []}},
            "log-probs of others": {"logprobs": {"content": [{"token_id": token + 1, "logprob": -0.5}]}},
            "above zero": {"logprobs": {"content": [content[0] | {"logprob": 0.5}]}},
            "not a number": {"logprobs": {"content": [content[0] | {"logprob": float("nan")}]}},
            "vLLM's not a number": {"logprobs": {"content": [content[0] | {"logprob": -9999.0}]}},
            "unknown finish": {"finish_reason": "error"},
            "unknown version": {"weight_versions": [{"version": "default", "start": 0, "end": 1}]},
            "no field": {"logprobs": 7},
        }

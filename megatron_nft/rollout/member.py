"""One server of the fleet: whether it serves this run's model, and its part in an update of the weights."""

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from megatron_nft.config import ServedConfig
from megatron_nft.errors import UserError
from megatron_nft.rollout.remote import Answer, Fault, Refused, Remote
from megatron_nft.rollout.wire import bucket_info, init_info

DESCRIBE = "megatron_nft_describe"  # of transfer.Extension


@dataclass
class Member:
    """A server, from the moment it was found to serve this run's model. Its methods raise Fault where it fails."""

    name: str
    remote: Remote
    instance: str  # of the process: one that was started anew at the same address has other weights
    slots: int  # answers it writes at a time
    workers: int
    rounds_head: bool
    link: Any = None  # the trainer's end of its process group
    version: int = -1  # of its weights
    is_in: bool = False  # it has the current weights, and is sent answers to write
    paused: bool = False
    busy: asyncio.Future | None = None  # its part in an update
    answers: dict[tuple, Answer] = field(default_factory=dict)  # that it is writing
    heard: float = 0.0  # time of its last token, or of when it got something to write
    preempted: float = 0.0  # answers, until the last statistics
    tokens: int = 0  # that came since the last statistics
    looks: int = 0  # at the server since then,
    idle: int = 0  # in which it wrote nothing,
    used: float = 0.0  # and the sum over the looks of the share of its slots that were taken

    async def pause(self, settings: ServedConfig) -> None:
        """Stop writing, as rollout.served.update says. Fails for a server that was started anew since it became a member."""
        if (await self.remote.rpc(DESCRIBE))["instance"] != self.instance:
            raise Fault("it was started anew")
        # "wait" lasts as long as answers do; a server that hangs meanwhile is found by its silence
        await self.remote.call(f"pause?mode={settings.update}", timeout=None if settings.update == "wait" else settings.transfer_timeout)
        self.paused = True

    async def begin(self, settings: ServedConfig) -> None:
        """Make the process group, where there is none, and tell the server that weights will come."""
        if self.link is None:
            await self._connect(settings.transfer_timeout)
        await self.remote.call("start_weight_update", timeout=settings.transfer_timeout)

    async def take(self, tensors: list[tuple[str, Tensor]], timeout: float) -> None:
        """Have the server take tensors under their Hugging Face names."""
        asked = self.remote.call("update_weights", {"update_info": bucket_info(tensors)}, 2 * timeout)
        await together(asked, in_thread(self.link.send, [tensor for _, tensor in tensors]))

    async def finish(self, version: int, settings: ServedConfig) -> None:
        """End an update: the new weights are used from here on, with nothing in memory that the old ones made."""
        timeout = settings.transfer_timeout
        await self.remote.call("finish_weight_update", {"weight_version": str(version)}, timeout)
        await self.reset_cache(timeout, running=True)
        self.version = version
        await self.remote.call("resume", timeout=timeout)
        self.paused = False

    async def reset_cache(self, timeout: float, running: bool = False) -> bool:
        """Empty the prefix cache. running: that of running answers, too; what they have is read again, by the weights of now."""
        reply = await self.remote.call(f"reset_prefix_cache{'?reset_running_requests=true' if running else ''}", timeout=timeout)
        if running and reply.get("success") is False:
            raise Fault("it kept its prefix cache")
        return reply.get("success", True)

    async def _connect(self, timeout: float) -> None:
        address, port = _own_address(self.remote.address)
        info = init_info(address, port, self.workers, timeout)
        asked = self.remote.call("init_weight_transfer_engine", {"init_info": info}, timeout)
        _, self.link = await together(asked, in_thread(open_link, address, port, self.workers, timeout))


async def join(name: str, remote: Remote, model: dict[str, Any], window: int, backend: str) -> Member:
    """The server as a member. Raises Fault where it does not answer, UserError where it serves another model or was started otherwise.

    model: the content of config.json; window: tokens of the longest prompt and answer together.
    """
    try:
        await remote.call("health", get=True)
        found = await remote.rpc(DESCRIBE)
        served, workers, slots = found["model"], int(found["workers"]), int(found["max_num_seqs"])
        instance = str(found["instance"])
    except (Refused, KeyError, TypeError):
        raise UserError(f"{remote.address} is no server of ours", "start it with `megatron-nft serve`") from None
    for key, value in served.items():
        if model.get(key, value) != value:
            raise UserError(
                f"the server {remote.address} serves another model: {key} is {value}, not {model[key]}",
                "start it with the config of the run",
            )
    for key, wanted in (("max_model_len", window), ("logprobs_mode", "processed_logprobs"), ("backend", backend)):
        if found[key] != wanted:
            raise UserError(f"the server {remote.address} has {key} {found[key]}, not {wanted}", "start it with the config of the run")
    return Member(name, remote, instance, slots, workers, bool(found["rounds_head"]))


def open_link(address: str, port: int, workers: int, timeout: float) -> Any:
    """The trainer's end of a server's process group."""
    from megatron_nft.rollout import transfer  # imports vLLM

    return transfer.link(address, port, workers, timeout)


async def together(*awaitables: Any) -> list[Any]:
    """The results of all. Where one fails the others are given up, and its error is raised."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def in_thread(function: Callable, *arguments: Any) -> Any:
    """What function(*arguments) returns. Its thread keeps nobody from ending: a transfer may hang for ever. RuntimeError becomes Fault."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as caught:  # whatever it is, it is raised where the result is waited for
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return await future
    except RuntimeError as error:
        raise Fault(f"the transfer failed: {str(error).splitlines()[0]}") from error


def _own_address(url: str) -> tuple[str, int]:
    """The address by which the server at `url` reaches this process, and a free port there."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        address = probe.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]

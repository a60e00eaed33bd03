"""Which servers are members, and what they all do in an update of the weights. All of it runs in the fleet's thread."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
from torch import Tensor

from megatron_nft.config import Config, max_model_len
from megatron_nft.errors import UserError
from megatron_nft.rollout import serving
from megatron_nft.rollout.member import Member, join
from megatron_nft.rollout.remote import Fault, Refused, Remote
from megatron_nft.rollout.wire import backend

TICK = 0.2  # seconds between two looks at the servers


class Membership(ABC):
    """The servers that were found."""

    _session: aiohttp.ClientSession

    def __init__(self, config: Config, model: dict[str, Any], note: Callable[[str], None]):
        self._config, self._settings, self._model, self._note = config, config.rollout.served, model, note
        self._members: dict[str, Member] = {}  # by address
        self._strangers: set[str] = set()  # addresses of servers that came during the run, and are none of its own

    @abstractmethod
    def _leave_out(self, member: Member, why: str) -> None:
        """A server failed, and is forgotten."""

    def _addresses(self) -> dict[str, str]:
        """{address: name} of servers that should be there."""
        if self._settings.addresses:
            return {address.rstrip("/"): address for address in self._settings.addresses}
        return {address: name for name, address in serving.found(self._config.run_dir).items()}

    async def _wait_for_servers(self) -> None:
        end, wanted = time.monotonic() + self._settings.start_timeout, len(self._settings.addresses) or self._settings.count
        while True:
            silent = await self._look(at_start=True)
            if len(self._members) >= wanted:
                return
            if time.monotonic() > end:
                missing = f"{', '.join(silent)} does not answer" if silent else f"{len(self._members)} of {wanted} servers are there"
                raise UserError(
                    f"{missing} after {self._settings.start_timeout} s",
                    f"start `megatron-nft serve` with the config of the run ({serving.directory(self._config.run_dir)} has the addresses), "
                    "or raise rollout.served.start_timeout",
                )
            await asyncio.sleep(TICK)

    async def _look(self, at_start: bool = False) -> list[str]:
        """Make members of the servers that answer; the addresses of those that do not. A server of another model or window is an error
        at the start; later it is told of once and passed over: the run goes on with those it has."""
        new = {address: name for address, name in self._addresses().items() if address not in self._members}
        joining = (self._join(address, name, at_start) for address, name in new.items())
        return [address for address, joined in zip(new, await asyncio.gather(*joining)) if not joined]

    async def _join(self, address: str, name: str, at_start: bool) -> bool:
        try:
            member = await join(name, Remote(self._session, address), self._model, max_model_len(self._config), backend())
        except Fault:
            return False
        except UserError as error:
            if at_start:
                raise
            if address not in self._strangers:
                self._strangers.add(address)
                self._note(f"{error.problem}: it is passed over")
            return False
        self._members = {**self._members, address: member}  # another one: a thread may be going through the old one
        self._note(f"server {address} is there ({member.workers} workers, {member.slots} answers at a time)")
        return True

    async def _look_for_more(self) -> bool:
        await self._look()
        return any(not member.is_in for member in self._members.values())

    async def _begin_update(self, seconds: float) -> list[Member]:
        """The servers that take part, paused and told of it. Where there is none it waits so long for one."""
        end = time.monotonic() + seconds
        while True:
            await self._look()
            members = await self._each(list(self._members.values()), lambda member: member.pause(self._settings))
            if members := await self._each(members, lambda member: member.begin(self._settings)):
                return members
            if time.monotonic() > end:
                return []
            await asyncio.sleep(TICK)

    async def _send_tensors(self, members: list[Member], tensors: list[tuple[str, Tensor]]) -> list[Member]:
        return await self._each(members, lambda member: member.take(tensors, self._settings.transfer_timeout))

    async def _end_update(self, members: list[Member], version: int) -> None:
        for member in await self._each(members, lambda member: member.finish(version, self._settings)):
            member.is_in, member.heard = True, time.monotonic()
        self._tell_all()

    async def _each(self, members: list[Member], do: Callable[[Member], Coroutine]) -> list[Member]:
        """Do it with all at once; those that are left are returned."""

        async def one(member: Member) -> bool:
            member.busy = asyncio.ensure_future(do(member))
            try:
                await asyncio.wait([member.busy])
                if not member.busy.cancelled():  # it was left out meanwhile
                    member.busy.result()
            except (Fault, Refused) as fault:
                self._leave_out(member, str(fault))
            return self._members.get(member.remote.address) is member

        kept = await asyncio.gather(*(one(member) for member in members))
        return [member for member, keep in zip(members, kept) if keep]

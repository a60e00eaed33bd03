"""Ranks that look at something each, and decide together: a fault that one rank finds ends all of them, and leaves none waiting."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_nft.errors import UserError, first_line
from megatron_nft.policy.topology import host

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A rank, and the node that it runs on."""

    rank: int
    host: str

    @classmethod
    def here(cls) -> "Place":
        """By the launcher's environment."""
        return cls(int(os.environ.get("RANK", "0")), host())

    def __str__(self) -> str:
        return f"{self.host} (rank {self.rank})"


def meet(seconds: int) -> None:
    """Start torch.distributed over gloo, which needs no GPU. Raises UserError where not all ranks come within `seconds`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds), **alone)
    except (RuntimeError, ValueError) as error:  # torch's and gloo's; a launcher's variable that is missing
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"{Place.here()} does not meet the other {world - 1} ranks at {address} ({first_line(error)})",
            "see that every node resolves and reaches that name (GLOO_SOCKET_IFNAME names the network), that nothing else has that port, "
            f"and that all ranks start within {seconds} s",
        ) from error


def gather(value: T) -> list[T]:
    """What every rank gives, in the order of ranks, on every rank. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(look: Callable[[], T]) -> dict[Place, T]:
    """What each rank finds. Collective: where a rank's `look` raises UserError, or the system refuses it a file, all ranks raise the
    UserError of the first such rank, which names it."""
    place, found, problem = Place.here(), None, None
    try:
        found = look()
    except UserError as error:
        problem = (error.problem, error.mend)
    except OSError as error:
        problem = (f"{error.filename} cannot be used ({error.strerror})", "see that it is there and that you may use it")
    everyone = gather((place, found, problem))
    for place, _, problem in everyone:
        if problem:
            raise UserError(f"{place}: {problem[0]}", problem[1])
    return {place: found for place, found, _ in everyone}


def leads(everyone: list[Place], place: Place) -> bool:
    """Whether a rank is the first of its node, which looks at what is the node's."""
    return place == min((other for other in everyone if other.host == place.host), key=lambda other: other.rank)

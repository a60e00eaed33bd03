"""Kernels that give the same bits each time: what `megatron.transformer.deterministic_mode` asks for beyond Megatron's own part in it.

On a GPU attention's backward pass and sums over answers add in whatever order threads come, unless they are told not to. Transformer
Engine and cuBLAS are told by the environment, before they are first used; torch by a switch of its own, which is on only while the
trainer's passes run: vLLM in the same process has kernels that know no such order, and would refuse.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_nft.config import Config
from megatron_nft.errors import UserError

# what each variable may be; the first is what it is set to where it is not set
ENVIRONMENT = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",), "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8")}


def asked(config: Config) -> bool:
    """Whether the config asks for the same bits each time."""
    return bool(config.megatron.transformer.get("deterministic_mode"))


def check(config: Config) -> None:
    """Raise UserError for an environment that asks for the opposite."""
    for name, allowed in ENVIRONMENT.items():
        if asked(config) and (given := os.environ.get(name, allowed[0])) not in allowed:
            raise UserError(
                f"megatron.transformer.deterministic_mode is on, and the environment's {name} is {given!r}",
                f"unset it, or set it to {' or '.join(allowed)}",
            )


def prepare(config: Config) -> None:
    """Set the environment where the config asks for it; before a layer is made or a matrix multiplied."""
    if asked(config):
        for name, allowed in ENVIRONMENT.items():
            os.environ.setdefault(name, allowed[0])


@contextmanager
def passes(config: Config) -> Iterator[None]:
    """What the trainer computes inside is the same each time, where the config asks for it."""
    if not asked(config):
        yield
        return
    on, warn, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel here writes all of what it returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filled

"""The parts of a training step on the device's own clock: transformer layers, head with loss, optimizer."""

import statistics
import time
from collections.abc import Callable

import torch

from megatron_nft.policy import Policy


def _mark():
    """Now, in the GPU's stream, or on a CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start, end) -> float:
    """Seconds between two marks; the second one has passed."""
    return start.elapsed_time(end) / 1000 if torch.cuda.is_available() else end - start


class Phases:
    """Watches a policy's updates while it is entered.

    layers: from the embedding's output to the last norm's, and of the gradients from there back to the embedding's output. head: between
    the two, where the one-pass loss makes its gradients. optimizer: Megatron's optimizer.step(). The rest is the embedding, the
    schedule's and the reduction of gradients.
    """

    def __init__(self, policy: Policy):
        self._policy, self._spans, self._open = policy, [], {}
        self._steps: list[dict[str, float]] = []

    def __enter__(self) -> "Phases":
        decoder, optimizer = self._policy.module.decoder, self._policy.optimizer
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        self._plain_step = optimizer.step
        optimizer.step = self._optimizer_step
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._policy.optimizer.step  # the class's own is there again

    def step(self, update: Callable[[], object]) -> None:
        """An update, whose parts are noted."""
        self._spans, self._open = [], {}
        update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found = dict.fromkeys(("layers", "head", "optimizer"), 0.0)
        for name, start, end in self._spans:
            found[name] += _between(start, end)
        self._steps.append(found)

    def medians(self, skip: int) -> dict[str, float]:
        """Seconds of each part, over the steps after the first few."""
        steps = self._steps[skip:] or self._steps
        return {name: statistics.median(step[name] for step in steps) for name in steps[0]}

    def _begin(self, name: str) -> None:
        self._open[name] = _mark()

    def _end(self, name: str) -> None:
        if name in self._open:
            self._spans.append((name, self._open.pop(name), _mark()))

    def _before(self, module, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if torch.is_tensor(hidden) and hidden.requires_grad:  # inference wraps it
            hidden.register_hook(lambda grad: self._end("layers"))
        self._begin("layers")

    def _after(self, module, args, output) -> None:
        self._end("layers")
        self._begin("head")
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, grad) -> None:
        self._end("head")
        self._begin("layers")

    def _optimizer_step(self):
        self._begin("optimizer")
        try:
            return self._plain_step()
        finally:
            self._end("optimizer")

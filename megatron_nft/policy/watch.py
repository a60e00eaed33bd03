"""How hard an update pushes the tokens of a few answers, noted while it is made: what one looks at to understand an objective."""

import random

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft.batching import Answers
from megatron_nft.objectives import Inputs
from megatron_nft.policy.topology import Topology
from megatron_nft.trajectories import Batch, Pushes


class Watch:
    """The answers of a rollout step that are watched, and what was noted of them.

    c = -dL/dlog pi_theta of a token times the denominator of the reduction. It is taken from the objective's own gradient, so that it is
    right for each of them: clips, corrections and one ratio an answer included (through a geometric mean, a token has its share of it).
    """

    def __init__(self, answers: Answers, count: int, seed: object):
        """Draws `count` of the rollout step's answers, by the seed alone: the same under every layout."""
        every = len(answers.groups)
        self.chosen = frozenset(random.Random(f"{seed}").sample(range(every), min(count, every)))
        self._answers = answers
        self._noted: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []

    def note(self, batch: Batch, slots: torch.Tensor, inputs: Inputs, loss: torch.Tensor) -> None:
        """Note R and c of a part of a micro-batch: its slots [tokens], the objective's inputs there, and the loss it made of them."""
        if not self.chosen.intersection(batch.answers):
            return
        (gradient,) = torch.autograd.grad(loss, inputs.logprobs, retain_graph=True)
        ratios = (inputs.logprobs - inputs.old_logprobs).detach().exp()
        self._noted.append((batch, slots, torch.stack([ratios, -gradient / inputs.scale]).float()))  # stays where it is: no waiting

    def collect(self, topology: Topology) -> list[Pushes]:
        """What was noted on all ranks, in order of the answers; empty on all ranks but the first. Collective, and once."""
        own = [part for noted in self._noted for part in self._parts(*noted)] if topology.speaks else []
        self._noted = []
        everyone: list | None = [None] * topology.world_size if topology.is_first else None
        dist.gather_object(own, everyone)
        parts: dict[int, list] = {}
        for number, *arrays in (part for rank in everyone or () for part in rank):
            parts.setdefault(number, []).append(arrays)
        return [self._joined(number, parts[number]) for number in sorted(parts)]

    def _parts(self, batch: Batch, slots: torch.Tensor, noted: torch.Tensor) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(number of the answer, positions of tokens, R and c [2, tokens]) of those that are watched."""
        index, counted = batch.answer_index[slots].cpu().numpy(), batch.loss_mask[slots].cpu().numpy() > 0
        positions, values = batch.positions[slots].cpu().numpy() + 1, noted.cpu().numpy()  # slot t predicts token t + 1
        here = ((number, counted & (index == i)) for i, number in enumerate(batch.answers) if number in self.chosen)
        return [(number, positions[of], values[:, of]) for number, of in here]

    def _joined(self, number: int, parts: list[list[np.ndarray]]) -> Pushes:
        """An answer of the parts that context-parallel ranks, and the chunks of a loss, have of it."""
        answers = self._answers
        values = np.full((2, answers.response_lengths[number]), None, object)
        for positions, found in parts:
            values[:, positions - answers.prompt_lengths[number]] = found
        first = np.searchsorted(answers.groups, answers.groups[number])
        return Pushes(int(answers.positions[number]), int(number - first), *values.tolist())

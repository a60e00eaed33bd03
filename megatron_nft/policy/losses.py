"""What the last pipeline stage makes of its hidden states: pi_old's log-probs, or the loss of a micro-batch and its metrics.

Only the sampled tokens that count are looked at; `counted` holds where those are. Under context parallelism a rank has the hidden states
of its own slots (context.Places). Metrics returned are this rank's share: summed over the context-parallel ranks they are the whole.
"""

from collections.abc import Callable

import torch

from megatron_nft.config import ObjectiveConfig
from megatron_nft.objectives import Inputs, measure
from megatron_nft.policy.context import Places
from megatron_nft.policy.logprobs import Head, fused_loss, logprobs
from megatron_nft.policy.watch import Watch
from megatron_nft.trajectories import Batch

Objective = Callable[[Inputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]
_FIELDS = ("old_logprobs", "verdict", "correct_rate", "weight", "scale", "correction", "answer_index")


def fill_old_logprobs(hidden: torch.Tensor, head: Head, batch: Batch, places: Places, settings: ObjectiveConfig) -> dict[str, torch.Tensor]:
    """Set batch.old_logprobs to this model's log-probs and batch.correction to what follows from them. Returns the sums MEASURED.

    hidden [tokens / cp, hidden], the same on every tensor-parallel rank.
    """
    counted, values, entropies = _whole(hidden, head, batch, places, with_entropy=True)
    given = (batch.sampler_logprobs[counted], batch.loss_mask[counted], batch.answer_index[counted])
    factor, sums = measure(values, entropies, *given, settings)
    batch.old_logprobs = values.new_zeros(len(batch.tokens)).index_put((counted,), values)
    batch.correction = factor.new_ones(len(batch.tokens)).index_put((counted,), factor)
    return _share(sums, places)


def loss(
    hidden: torch.Tensor,
    head: Head,
    batch: Batch,
    places: Places,
    objective: Objective,
    settings: ObjectiveConfig,
    measured: bool,
    own: bool,
    scale: float = 1.0,
    watch: Watch | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, and its metrics: `loss`, the objective's, and with `measured` MEASURED.

    own: the policy is still pi_old, so that the log-probs found here are pi_old's (R = 1), and the correction is made from them.
    scale: fp16's loss scale, by which the schedule multiplies the loss. watch: notes R and c of some answers.
    Settings that decide by the answer need all its log-probs at once, and so the recomputing form of logprobs.py; a loss by the token is
    made of each rank's own slots alone.
    """
    by_token = settings.ratio == "token" and (not measured or settings.correction.level == "token")
    if by_token:
        here = _counted(batch.loss_mask[places.own])
        counted = places.own[here]
    else:
        counted, values, entropies = _whole(hidden, head, batch, places, with_entropy=measured)
    fields = {name: getattr(batch, name)[counted] for name in _FIELDS}
    mask, sampler = batch.loss_mask[counted], batch.sampler_logprobs[counted]

    def loss_of(values: torch.Tensor, entropies: torch.Tensor | None, part: slice):
        given, sums = {name: field[part] for name, field in fields.items()}, {}
        if measured:
            factor, sums = measure(values.detach(), entropies, sampler[part], mask[part], given["answer_index"], settings)
            if own:
                given |= {"old_logprobs": values.detach(), "correction": factor}
        inputs = Inputs(logprobs=values, mask=mask[part], **given)
        total, metrics = objective(inputs)
        if watch is not None and (by_token or places.rank == 0):  # otherwise every context-parallel rank has the whole
            watch.note(batch, counted[part], inputs, total)
        return total, {"loss": total.detach(), **metrics, **sums}

    if by_token:
        return fused_loss(hidden[here], head, batch.targets[counted], loss_of, with_entropy=measured, scale=scale)
    total, metrics = loss_of(values, entropies, slice(None))
    return total, _share(metrics, places)


def _whole(
    hidden: torch.Tensor, head: Head, batch: Batch, places: Places, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of the whole micro-batch, on every context-parallel rank: where the tokens are that count [counted], their log-probs and entropies.
    The gradient is of this rank's own slots."""
    here = _counted(batch.loss_mask[places.own])
    values, entropies = logprobs(hidden[here], head, batch.targets[places.own[here]], with_entropy)
    counted = _counted(batch.loss_mask)

    def of_all(found: torch.Tensor) -> torch.Tensor:
        return places.gather(found.new_zeros(len(places.own)).index_put((here,), found))[counted]

    return counted, of_all(values), None if entropies is None else of_all(entropies)


def _share(metrics: dict[str, torch.Tensor], places: Places) -> dict[str, torch.Tensor]:
    """Sums that every context-parallel rank has in full, as the share of one of them."""
    return {name: value if places.rank == 0 or name.endswith("_max") else torch.zeros_like(value) for name, value in metrics.items()}


def _counted(mask: torch.Tensor) -> torch.Tensor:
    """Where the mask is 1. In slots of padding alone one masked token stands for all: it adds 0 to every sum."""
    counted = mask.nonzero()[:, 0]
    return counted if len(counted) else counted.new_zeros(1)

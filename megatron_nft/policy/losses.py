"""What the last pipeline stage makes of its hidden states: pi_old's log-probs, or the loss of a micro-batch and its metrics.

Only the sampled tokens that count are looked at; tensors named `counted` hold their positions [counted] among a batch's [tokens].
"""

from collections.abc import Callable

import torch

from megatron_nft.config import ObjectiveConfig
from megatron_nft.objectives import Inputs, measure
from megatron_nft.policy.logprobs import Head, fused_loss, logprobs
from megatron_nft.trajectories import Batch

Objective = Callable[[Inputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]
_FIELDS = ("old_logprobs", "verdict", "correct_rate", "weight", "scale", "correction", "answer_index")


def fill_old_logprobs(hidden: torch.Tensor, head: Head, batch: Batch, settings: ObjectiveConfig) -> dict[str, torch.Tensor]:
    """Set batch.old_logprobs to this model's log-probs and batch.correction to what follows from them. Returns the sums MEASURED.

    hidden [tokens, hidden], the same on every tensor-parallel rank.
    """
    counted = _counted(batch)
    values, entropies = logprobs(hidden[counted], head, batch.targets[counted], with_entropy=True)
    given = (batch.sampler_logprobs[counted], batch.loss_mask[counted], batch.answer_index[counted])
    factor, sums = measure(values, entropies, *given, settings)
    batch.old_logprobs = values.new_zeros(len(batch.tokens)).index_put((counted,), values)
    batch.correction = factor.new_ones(len(batch.tokens)).index_put((counted,), factor)
    return sums


def loss(
    hidden: torch.Tensor, head: Head, batch: Batch, objective: Objective, settings: ObjectiveConfig, measured: bool, own: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, and its metrics: `loss`, the objective's, and with `measured` MEASURED.

    own: the policy is still pi_old, so that the log-probs found here are pi_old's (R = 1), and the correction is made from them.
    Settings that decide by the answer need all its log-probs at once, and so the recomputing form of logprobs.py.
    """
    counted = _counted(batch)
    fields = {name: getattr(batch, name)[counted] for name in _FIELDS}
    mask, sampler, targets = batch.loss_mask[counted], batch.sampler_logprobs[counted], batch.targets[counted]

    def loss_of(values: torch.Tensor, entropies: torch.Tensor | None, part: slice):
        given, sums = {name: field[part] for name, field in fields.items()}, {}
        if measured:
            factor, sums = measure(values.detach(), entropies, sampler[part], mask[part], given["answer_index"], settings)
            if own:
                given |= {"old_logprobs": values.detach(), "correction": factor}
        total, metrics = objective(Inputs(logprobs=values, mask=mask[part], **given))
        return total, {"loss": total.detach(), **metrics, **sums}

    if settings.ratio == "token" and (not measured or settings.correction.level == "token"):
        return fused_loss(hidden[counted], head, targets, loss_of, with_entropy=measured)
    values, entropies = logprobs(hidden[counted], head, targets, with_entropy=measured)
    return loss_of(values, entropies, slice(None))


def _counted(batch: Batch) -> torch.Tensor:
    """Where the mask is 1. In a batch of padding alone one masked token stands for all: it adds 0 to every sum."""
    counted = batch.loss_mask.nonzero()[:, 0]
    return counted if len(counted) else counted.new_zeros(1)

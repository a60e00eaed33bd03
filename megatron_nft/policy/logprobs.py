"""Log-probs and entropies of sampled tokens, and losses of them, from hidden states and a vocabulary-parallel head, chunk by chunk.

Logits [tokens, vocab] never exist: one buffer holds those of a chunk. Two forms give the same gradient. The one-pass form takes a
loss that is a sum over tokens, whose gradient is known from a chunk's log-probs alone: it is made while the chunk's softmax is
there. The recomputing form keeps three numbers a token and makes each chunk's logits again in the backward pass, for losses that
need all log-probs first. Logits are float32 (float64 of float64 operands), from operands in the model's precision.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_nft.policy import versions

CHUNK_BYTES = 2**29  # of the buffer: 882 tokens of a vocabulary of 152,064

# (log-probs [chunk], entropies [chunk] or None, which of the tokens) -> loss (a scalar, summed), metrics (sums; names in _max: maxima)
LossOf = Callable[[torch.Tensor, torch.Tensor | None, slice], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Head:
    """softmax(hidden @ weight.T / temperature) is the policy. Tensor-parallel ranks hold consecutive rows of the weight."""

    weight: torch.Tensor  # [padded vocab / tp, hidden], this rank's rows
    vocab_size: int  # without the padding
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None  # the tensor-parallel ranks; None: this one alone


def logprobs(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, with_entropy: bool = False, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of the targets, differentiable in hidden and the head's weight (recomputing form), and, if asked for, the entropies of
    the distributions they are from, in nats and without gradient.

    hidden [tokens, hidden] and targets [tokens], in [0, vocab_size), are the same on every tensor-parallel rank, and so are the results,
    [tokens] in float32 (float64 for float64). chunk: tokens in the buffer. One collective for all chunks.
    The gradient of `hidden` is this rank's part of the sum over the group: feed hidden through Megatron's
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region, whose backward sums it.
    """
    values, entropies = _LogProbs.apply(hidden, head.weight, head, targets, with_entropy, chunk)
    return values, entropies if with_entropy else None


def fused_loss(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    loss_of: LossOf,
    with_entropy: bool = False,
    chunk: int | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the metrics of `loss_of`, summed over chunks, in the one-pass form: loss_of must be a sum over tokens.

    Tensors as in `logprobs`. One small collective per chunk. The gradients are made here, so `backward` can run once only; where
    gradients are off, or nothing needs one, nothing of them is computed. scale: what the loss is going to be multiplied by before
    `backward`, fp16's loss scale: without it here gradients would be rounded to 16 bits while they are small.
    """
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, head.weight))
    metrics: dict[str, torch.Tensor] = {}
    loss = _FusedLoss.apply(hidden, head.weight, head, targets, loss_of, with_entropy, chunk, scale, wanted, metrics)
    return loss, metrics


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, targets, with_entropy, chunk):
        work = _Chunks(hidden, head, targets, chunk)
        told = torch.cat([work.softmax(part, with_entropy)[2] for part in work.parts])
        values, entropies, lse = _combine(told, head.group)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.head, ctx.chunk = head, chunk
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, _, targets, lse = ctx.saved_tensors
        work = _Chunks(hidden, ctx.head, targets, ctx.chunk)
        gradients = work.gradients(ctx.needs_input_grad[:2])
        for part in work.parts:
            softmax = work.logits(part).sub_(lse[part, None]).exp_()
            work.accumulate(gradients, part, softmax, grad[part], grad[part])
            del softmax
        return (*work.finish(gradients), None, None, None, None)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head, targets, loss_of, with_entropy, chunk, scale, wanted, metrics):
        work = _Chunks(hidden, head, targets, chunk)
        gradients = work.gradients(wanted)
        losses, sums = [], []
        for part in work.parts:
            softmax, largest, told = work.softmax(part, with_entropy)
            values, entropies, lse = _combine(told, head.group)
            with torch.enable_grad():
                values = values.requires_grad_()
                loss, made = loss_of(values, entropies, part)
            losses.append(loss.detach())
            sums.append(made)
            if any(wanted):
                coefficient = scale * torch.autograd.grad(loss, values)[0]
                work.accumulate(gradients, part, softmax, coefficient, coefficient * (largest - lse).detach().exp())
            del softmax  # a GPU makes the next chunk's logits in new memory: never two of them
        ctx.gradients, ctx.scale = work.finish(gradients), scale
        metrics.update(_merge(sums))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("a fused loss goes backward once: its gradients were made with it and have been handed on")
        # handed on and multiplied in place: a second copy of the weight's gradient would be the largest tensor here
        gradients, ctx.gradients = ctx.gradients, None
        left = grad / ctx.scale
        return (*(None if g is None else g.mul_(left) for g in gradients), None, None, None, None, None, None, None, None)


class _Chunks:
    """The tokens of a pass, cut into parts, and the buffer [part, vocab / tp] in which each is worked on. Padding has the logit -inf."""

    def __init__(self, hidden: torch.Tensor, head: Head, targets: torch.Tensor, chunk: int | None):
        rows = len(head.weight)
        self.hidden, self.head = hidden, head
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.mixed = _multiplies_wide(hidden.device) and hidden.dtype != self.dtype
        self.weight = self._operand(head.weight)
        self.parts = _cut(len(hidden), chunk or max(CHUNK_BYTES // (rows * self.dtype.itemsize), 1))
        most = self.parts[0].stop
        self.buffer = None if self.mixed else torch.empty(most, rows, dtype=self.dtype, device=hidden.device)
        first = 0 if head.group is None else dist.get_rank(head.group) * rows
        local = targets - first
        self.mine = (local >= 0) & (local < rows)  # [tokens]: whether the target is among this rank's rows
        self.local = local.masked_fill(~self.mine, 0)
        self.real = max(head.vocab_size - first, 0)  # rows from here on are padding

    def logits(self, part: slice) -> torch.Tensor:
        h = self._operand(self.hidden[part])
        logits = self._product(h, self.weight.T, self.buffer)
        if self.head.temperature != 1.0:
            logits.div_(self.head.temperature)
        if self.real < logits.shape[1]:
            logits[:, self.real :] = float("-inf")
        return logits

    def softmax(self, part: slice, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """exp(logit - largest) in the buffer, the largest [part], and what the other ranks must be told [part, 2, or 3 for entropy]:
        log of the sum of exp(logit), the target's logit (0 where it is elsewhere), the mean logit under this rank's softmax."""
        logits = self.logits(part)
        picked = logits.gather(1, self.local[part, None])[:, 0].masked_fill(~self.mine[part], 0.0)
        largest = logits.amax(-1).clamp(min=torch.finfo(self.dtype).min)  # a rank may hold nothing but padding
        exps = logits.sub_(largest[:, None]).exp_()
        total = exps.sum(-1)
        told = [largest + total.log(), picked]
        if with_entropy:
            # sum x e^x from e^x alone, a few rows at a time: no second buffer
            few = max(len(exps) // 16, 1)
            spread = torch.cat([torch.special.entr(rows).sum(-1) for rows in exps.split(few)])
            told.append(largest - spread / total.clamp(min=torch.finfo(self.dtype).tiny))
        return exps, largest, torch.stack(told, -1)

    def gradients(self, wanted) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `accumulate` fills: the gradient of hidden in its own precision, that of the weight in float32 or wider."""
        hidden, weight = self.hidden, self.head.weight
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        return d_hidden, torch.zeros(weight.shape, dtype=self.dtype, device=weight.device) if wanted[1] else None

    def accumulate(self, gradients, part: slice, exps: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor) -> None:
        """Add a part's gradients. grad [part]: dL / dlog-prob; exps times factor [part] is the softmax times grad. May overwrite exps."""
        d_hidden, d_weight = gradients
        temperature = self.head.temperature
        d = self._d_logits(part, exps, factor / -temperature, grad / temperature * self.mine[part])
        if d_hidden is not None:
            d_hidden[part] = d @ self.weight
        if d_weight is not None:
            h = self._operand(self.hidden[part])
            if self.mixed:
                versions.add_product(d_weight, d.T, h)
            else:
                d_weight.addmm_(d.T, h)

    def _d_logits(self, part: slice, exps: torch.Tensor, factor: torch.Tensor, at_target: torch.Tensor) -> torch.Tensor:
        """exps x factor [part], and at_target [part] more at the target, as an operand: d log-prob / d logits = (onehot - softmax) /
        temperature. Where that has 16 bits it is rounded in the same pass over the chunk; every entry is rounded once."""
        at, factor = self.local[part, None], factor[:, None]
        if not self.mixed:
            return exps.mul_(factor).scatter_add_(1, at, at_target[:, None])
        d = torch.mul(exps, factor, out=torch.empty_like(exps, dtype=self.hidden.dtype))
        return d.scatter_(1, at, (exps.gather(1, at) * factor + at_target[:, None]).to(d.dtype))

    def finish(self, gradients) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        d_hidden, d_weight = gradients
        return d_hidden, None if d_weight is None else d_weight.to(self.head.weight.dtype)

    def _operand(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.hidden.dtype if self.mixed else self.dtype)

    def _product(self, a: torch.Tensor, b: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        if self.mixed:
            return torch.mm(a, b, out_dtype=self.dtype)  # never rounded to 16 bits
        return torch.mm(a, b, out=None if buffer is None else buffer[: len(a)])


def _multiplies_wide(device: torch.device) -> bool:
    """Whether 16-bit operands can be multiplied into float32: on CUDA. On the CPU both are made float32 first."""
    return device.type == "cuda"


def _cut(tokens: int, most: int) -> list[slice]:
    """Parts of equal size (the last may be smaller) of at most `most` tokens; one empty part of no tokens."""
    count = max(-(-tokens // most), 1)
    size = -(-tokens // count)
    return [slice(i * size, min((i + 1) * size, tokens)) for i in range(count)]


def _combine(told: torch.Tensor, group) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What each rank tells of its rows (`_Chunks.softmax`) [tokens, 2 or 3] -> log-probs, entropies or None, log of the whole sum."""
    shards = _all_gather(told, group)
    lse = shards[..., 0].logsumexp(0)
    entropies = None
    if shards.shape[-1] == 3:
        entropies = lse - ((shards[..., 0] - lse).exp() * shards[..., 2]).sum(0)
    return shards[..., 1].sum(0) - lse, entropies, lse


def _merge(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: values.amax(0) if name.endswith("_max") else values.sum(0) for name, values in stacked.items()}


def _all_gather(x: torch.Tensor, group) -> torch.Tensor:
    """[...] -> [tp, ...]"""
    if group is None or dist.get_world_size(group) == 1:
        return x[None]
    shards = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, x.contiguous(), group=group)
    return torch.stack(shards)

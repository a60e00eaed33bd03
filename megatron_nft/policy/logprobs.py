"""Log-probs and entropies of sampled tokens from hidden states and a vocabulary-parallel head, chunk by chunk.

Logits [tokens, vocab] never exist: the forward pass keeps three numbers a token, the backward pass makes each chunk's
logits again. Logits are float32, from operands in the model's precision.
"""

import torch
import torch.distributed as dist

CHUNK = 1024  # tokens


def logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets], differentiable in hidden and weight.

    hidden [tokens, hidden], the same on every tensor-parallel rank; weight [padded vocab / tp, hidden], this rank's rows;
    targets [tokens] in [0, vocab_size). Returns float32 (float64 for float64 input) [tokens], the same on every rank of `group`.
    The gradient of `hidden` is this rank's part of the sum over the group: feed hidden through Megatron's
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region, whose backward sums it.
    """
    return _LogProbs.apply(hidden, weight, targets, vocab_size, temperature, group, chunk)


@torch.no_grad()
def entropies(hidden, weight, vocab_size, temperature=1.0, group=None, chunk=CHUNK) -> torch.Tensor:
    """Entropy [tokens], in nats, of the distribution that `logprobs` takes its log-probs from. No gradient."""
    parts = []  # per token: logsumexp over this rank's part of the vocabulary, mean logit under its softmax
    for h in hidden.split(chunk):
        logits = _logits(h, weight, vocab_size, temperature, group)
        lse = logits.logsumexp(-1)
        # a padded column has probability 0 and logit -inf: 0 * -inf must count 0
        mean = torch.nan_to_num((logits - lse[:, None]).exp() * logits, nan=0.0).sum(-1)
        parts.append(torch.stack([lse, mean], -1))
    local = torch.cat(parts)  # [tokens, 2]
    shards = torch.stack(_all_gather(local, group))  # [tp, tokens, 2]
    lse = shards[..., 0].logsumexp(0)
    return lse - ((shards[..., 0] - lse).exp() * shards[..., 1]).sum(0)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, temperature, group, chunk):
        local_targets, mine = _localize(targets, weight, group)
        parts = []  # per token: logsumexp over this rank's vocabulary, logit of the target if it is here
        for h, t, m in zip(hidden.split(chunk), local_targets.split(chunk), mine.split(chunk)):
            logits = _logits(h, weight, vocab_size, temperature, group)
            picked = logits.gather(1, t[:, None])[:, 0].masked_fill(~m, 0.0)
            parts.append(torch.stack([logits.logsumexp(-1), picked], -1))
        shards = torch.stack(_all_gather(torch.cat(parts), group))  # [tp, tokens, 2]: the only collective
        lse = shards[..., 0].logsumexp(0)
        ctx.save_for_backward(hidden, weight, local_targets, mine, lse)
        ctx.settings = vocab_size, temperature, group, chunk
        return shards[..., 1].sum(0) - lse

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, local_targets, mine, lse = ctx.saved_tensors
        vocab_size, temperature, group, chunk = ctx.settings
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h, g = hidden[part], grad[part] / temperature
            # d logp / d logits = onehot - softmax
            d = (_logits(h, weight, vocab_size, temperature, group) - lse[part, None]).exp_().mul_(-g[:, None])
            d.scatter_add_(1, local_targets[part, None], (g * mine[part])[:, None])
            d = d.to(hidden.dtype)
            d_hidden[part] = d @ weight
            d_weight += d.T @ h
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None, None


def _logits(h, weight, vocab_size, temperature, group) -> torch.Tensor:
    """[chunk, vocab / tp] in float32 or wider, padding columns at -inf."""
    if h.dtype in (torch.float32, torch.float64):
        logits = h @ weight.T
    elif h.is_cuda:
        logits = torch.mm(h, weight.T, out_dtype=torch.float32)  # 16-bit operands, never rounded to 16 bits
    else:
        logits = h.float() @ weight.float().T
    logits = logits / temperature if temperature != 1.0 else logits
    real = vocab_size - _first_row(weight, group)
    if real < len(weight):
        logits[:, max(real, 0) :] = float("-inf")
    return logits


def _localize(targets, weight, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Target's row within this rank's part of the vocabulary (0 where it is elsewhere), and whether it is here."""
    local = targets - _first_row(weight, group)
    mine = (local >= 0) & (local < len(weight))
    return local.masked_fill(~mine, 0), mine


def _first_row(weight, group) -> int:
    return 0 if group is None else dist.get_rank(group) * len(weight)


def _all_gather(x: torch.Tensor, group) -> list[torch.Tensor]:
    if group is None or dist.get_world_size(group) == 1:
        return [x]
    shards = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, x.contiguous(), group=group)
    return shards

"""The two layer modules that Megatron-Core's local layer spec lacks: a norm that knows sequence parallelism, and attention
over packed sequences. Both run on CPU and on a GPU without Transformer Engine."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, over the last dimension; float32 inside for 16-bit inputs. The weight is in params_dtype.

    Under sequence parallelism every rank sees only its part of the tokens, so the weight is marked `sequence_parallel`:
    Megatron then sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # one kernel
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed batch, with grouped queries.

    Sequences are laid out as rows of a rectangle, right-padded, so that one scaled_dot_product_attention call serves
    many of them: under a causal mask no real token can see the padding behind it. Rows are cut into blocks of similar
    length to bound the waste. The last sequence of `cu_seqlens` is the padding of the micro-batch (batching.pack): its output
    is zero.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__()
        self.scale = softmax_scale  # None: 1 / sqrt(head dimension)

    def forward(self, query, key, value, attention_mask, *, packed_seq_params, **unused) -> torch.Tensor:
        """query [tokens / cp, heads, d], key and value [tokens / cp, kv heads, d] -> [tokens / cp, heads * d].

        Under context parallelism every rank gathers the keys and values of all of them and attends with its own queries.
        """
        if packed_seq_params.places.size > 1:
            key, value = packed_seq_params.places.gather(torch.stack([key, value], 1), shared=True).unbind(1)  # [tokens, kv heads, d]
        out, rectangles = torch.zeros_like(query), _rectangles(packed_seq_params)
        if not rectangles:  # nothing but padding: zeros that autograd can walk through, for DDP waits for every parameter's gradient
            out = 0.0 * query + (0.0 * key).sum() + (0.0 * value).sum()
        for block in rectangles:
            q, k, v = (t[i].transpose(1, 2) for t, i in ((query, block.queries), (key, block.keys), (value, block.keys)))
            attended = F.scaled_dot_product_attention(
                q, k, v, block.mask, is_causal=block.mask is None, scale=self.scale, enable_gqa=True
            )  # [rows, heads, length, d]
            out = out.index_put((block.queries[block.real],), attended.transpose(1, 2)[block.real])
        return out.flatten(1)


@dataclass(frozen=True)
class _Rectangle:
    """Sequences of similar length as right-padded rows."""

    queries: torch.Tensor  # int64 [rows, longest / cp]: among this rank's tokens
    real: torch.Tensor  # bool [rows, longest / cp]: which of them are no padding of a row
    keys: torch.Tensor  # int64 [rows, longest]: among all tokens
    mask: torch.Tensor | None  # bool [rows, 1, longest / cp, longest], true where a query sees a key; None: plainly causal


def _rectangles(packed_seq_params) -> list[_Rectangle]:
    """The blocks of a micro-batch, worked out in the first layer and kept with its PackedSeqParams for the others."""
    if not hasattr(packed_seq_params, "rectangles"):
        starts, lengths = _spans(packed_seq_params.cu_seqlens_q[:-1])
        packed_seq_params.rectangles = [_rectangle(starts[b], lengths[b], packed_seq_params) for b in _blocks(lengths)]
    return packed_seq_params.rectangles


def _spans(cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and lengths of the sequences that are not empty, longest first, on the CPU."""
    bounds = cu_seqlens.cpu().long()
    starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[lengths[order] > 0]
    return starts[order], lengths[order]


def _blocks(lengths: torch.Tensor) -> list[slice]:
    """Runs of sequences (longest first) whose shortest is at least half its longest."""
    blocks, first = [], 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or 2 * lengths[i] < lengths[first]:
            blocks.append(slice(first, i))
            first = i
    return blocks


def _rectangle(starts: torch.Tensor, lengths: torch.Tensor, packed_seq_params) -> _Rectangle:
    places, device = packed_seq_params.places, packed_seq_params.cu_seqlens_q.device
    keys, real, offsets = _rows(starts, lengths)
    if places.size == 1:
        return _Rectangle(keys.to(device), real.to(device), keys.to(device), None)
    queries, real, own = _rows(starts // places.size, lengths // places.size)
    width = lengths[:, None] // (2 * places.size)  # of a slice: this rank holds numbers rank and 2 x size - 1 - rank
    positions = torch.where(own < width, places.rank * width + own, (2 * places.size - 2 - places.rank) * width + own)
    positions = torch.where(real, positions, 0)  # a padded query sees something, for a softmax over nothing is no number
    mask = offsets <= positions[:, None, :, None]
    return _Rectangle(*(t.to(device) for t in (queries, real, keys, mask)))


def _rows(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token numbers [rows, longest] of right-padded rows, which of them are real, and the offsets [longest]."""
    offsets = torch.arange(int(lengths.max()))
    real = offsets < lengths[:, None]
    return torch.where(real, starts[:, None] + offsets, starts[:, None]), real, offsets

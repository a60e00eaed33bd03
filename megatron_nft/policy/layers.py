"""The two layer modules that Megatron-Core's local layer spec lacks: a norm that knows sequence parallelism, and attention
over packed sequences. Both run on CPU and on a GPU without Transformer Engine."""

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
        """query [tokens, heads, d], key and value [tokens, kv heads, d] -> [tokens, heads * d]."""
        out, rectangles = torch.zeros_like(query), _rectangles(packed_seq_params)
        if not rectangles:  # nothing but padding: zeros that autograd can walk through, for DDP waits for every parameter's gradient
            out = 0.0 * (query + key.sum() + value.sum())
        for index, real in rectangles:
            q, k, v = (t[index].transpose(1, 2) for t in (query, key, value))  # [rows, heads, length, d]
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            out = out.index_put((index[real],), attended.transpose(1, 2)[real])
        return out.flatten(1)


def _rectangles(packed_seq_params) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The blocks of a micro-batch, worked out in the first layer and kept with its PackedSeqParams for the others."""
    if not hasattr(packed_seq_params, "rectangles"):
        cu_seqlens = packed_seq_params.cu_seqlens_q
        starts, lengths = _spans(cu_seqlens[:-1])
        packed_seq_params.rectangles = [_rectangle(starts[b], lengths[b], cu_seqlens.device) for b in _blocks(lengths)]
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


def _rectangle(starts: torch.Tensor, lengths: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers [rows, longest] of the right-padded rows, and which of them are real."""
    offsets = torch.arange(int(lengths.max()))
    real = offsets < lengths[:, None]
    index = torch.where(real, starts[:, None] + offsets, starts[:, None])
    return index.to(device), real.to(device)

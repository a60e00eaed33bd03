"""torch's variable-length attention for packed sequences on a GPU without Transformer Engine: the same interface as PackedAttention."""

import torch

from megatron_nft.policy import versions


class VarlenAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed batch, in one FlashAttention call; 16-bit inputs on CUDA.

    The padding at the tail of a micro-batch attends to itself like any sequence: what comes out of it is finite and counts nowhere.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__()
        self.attend = versions.causal_varlen_attention(softmax_scale)  # None: 1 / sqrt(head dimension)

    def forward(self, query, key, value, attention_mask, *, packed_seq_params, **unused) -> torch.Tensor:
        """query [tokens, heads, d], key and value [tokens, kv heads, d] -> [tokens, heads * d]."""
        # max_seqlen counts the padding, too: told less, the kernel would leave rows of the output unset
        return self.attend(query, key, value, packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q).flatten(1)

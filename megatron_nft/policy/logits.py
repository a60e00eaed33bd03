"""Log-probs of a whole vocabulary, for comparing models; training never makes them (see logprobs.py)."""

import torch
from torch import Tensor

from megatron_nft.policy import context, model
from megatron_nft.policy.topology import device


@torch.no_grad()
def vocabulary_logprobs(policy, tokens: list[int]) -> Tensor:
    """float32 [tokens, vocabulary]: of what follows each token of one sequence. For a policy that is not cut over ranks."""
    from megatron.core.packed_seq_params import PackedSeqParams

    length = len(tokens)
    cu_seqlens = torch.tensor([0, length, length], dtype=torch.int32, device=device())  # the last sequence is the padding
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=length, max_seqlen_kv=length)
    packed.places = context.Places(cu_seqlens, None)
    ids, positions = torch.tensor([tokens], device=device()), torch.arange(length, device=device())[None]
    hidden = policy.module(ids, positions, None, packed_seq_params=packed)[0]  # [tokens, hidden]
    logits = hidden @ model.head_weight(policy.module).T
    return logits[:, : policy.hf["vocab_size"]].float().log_softmax(-1)

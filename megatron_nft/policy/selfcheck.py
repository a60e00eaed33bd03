"""The trainer's side of the check that the sampler has its weights: checksums, and log-probs of fixed tokens."""

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft import batching
from megatron_nft.checksums import Checksum, bit_sum
from megatron_nft.config import ObjectiveConfig
from megatron_nft.policy import versions
from megatron_nft.policy.topology import device
from megatron_nft.weights import expert_number

if TYPE_CHECKING:
    from megatron_nft.policy.policy import Policy


def checksums(policy: "Policy") -> dict[frozenset[str], Checksum]:
    """Checksums of the whole model, on every rank, by the Hugging Face names that make a Megatron tensor. A collective.

    They are made of each rank's own shards: what is gathered for the sampler is checked, not trusted.
    """
    policy.gather_parameters()
    names = policy.table.megatron_names()
    place = {name: i for i, name in enumerate(names)}
    sums, dtypes = torch.zeros(len(names), dtype=torch.int64, device=device()), {}
    for name, parameter in policy.named_parameters():
        at, values = place[policy.table.canonical(name)], versions.values_of(parameter)
        dtypes[at] = str(values.dtype)
        if _counts(policy, name, values):
            sums[at] += bit_sum(values)
    dist.all_reduce(sums)
    known = _of_all_stages(dtypes)
    return {
        frozenset(policy.table.hf_shapes_of(name)): Checksum(total, known[i]) for i, (name, total) in enumerate(zip(names, sums.tolist()))
    }


def _counts(policy: "Policy", name: str, values: torch.Tensor) -> bool:
    """Whether this rank's shard is one of those that make up the tensor: replicas hold the same, and what is not cut every slice has."""
    from megatron.core import parallel_state as groups

    expert = expert_number(name) is not None
    replica = groups.get_expert_data_parallel_rank() if expert else groups.get_data_parallel_rank(with_context_parallel=True)
    number, slices = policy.topology.slice_of(expert)
    cut = slices > 1 and values.numel() != sum(prod(shape) for shape in policy.table.hf_shapes_of(name).values())
    return replica == 0 and (cut or number == 0)


def _of_all_stages(dtypes: dict[int, str]) -> dict[int, str]:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dtypes)
    return {at: dtype for one in everyone for at, dtype in one.items()}


def token_logprobs(policy: "Policy", sequences: list[list[int]]) -> list[list[float]]:
    """Log-prob of every token given those before it, at temperature 1: one list for each sequence, shorter by one than the sequence.

    A collective: every rank gives the same sequences, each of two tokens at least, and gets all of the result.
    """
    answers = {i: batching.TrainingAnswer(s[:1], s[1:], [0.0] * (len(s) - 1), [1] * (len(s) - 1), 0.0) for i, s in enumerate(sequences)}
    ones, lengths = np.ones(len(answers), int), np.array([len(s) - 1 for s in sequences])
    table = batching.Answers(ones, lengths, lengths, np.zeros(len(answers)), np.zeros(len(answers)), np.arange(len(answers)))
    layout = replace(policy.layout(len(answers)), data_parallel_size=1)  # every replica does the same
    plan = batching.plan(table, layout, lambda verdicts, _: verdicts, "constant", 1.0)
    [batches] = policy.pack(plan, answers, replica=0)
    sampled_at, policy.temperature = policy.temperature, 1.0
    policy.fill_old_logprobs(batches, ObjectiveConfig())
    policy.temperature = sampled_at
    found = [_by_answer(batches) if policy.topology.is_last_stage else None]
    if policy.topology.pipeline_size > 1:
        from megatron.core import parallel_state

        dist.broadcast_object_list(
            found, group=parallel_state.get_pipeline_model_parallel_group(), group_src=policy.topology.pipeline_size - 1
        )
    return [found[0][i] for i in range(len(sequences))]


def _by_answer(batches: list) -> dict[int, list[float]]:
    return {
        number: batch.old_logprobs[(batch.answer_index == i) & (batch.loss_mask == 1)].tolist()
        for batch in batches
        for i, number in enumerate(batch.answers)
    }

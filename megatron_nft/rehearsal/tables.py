"""A rehearsal as text."""

from typing import TYPE_CHECKING

from megatron_nft.planner.plan import gib
from megatron_nft.planner.tables import LABEL, aligned, amount
from megatron_nft.rehearsal.ranks import lines

if TYPE_CHECKING:
    from megatron_nft.rehearsal import Rehearsal

ROWS = 40  # of the rank map that are printed; --json has all


def text(found: "Rehearsal") -> str:
    """All of it."""
    parts = [_title(found), _map(found), _queue(found), _packing(found), _stream(found), _checkpoint(found), _comparison(found)]
    return "\n\n".join(parts)


def _title(found: "Rehearsal") -> str:
    real = "real queue, packing and Megatron groups; seconds are estimates"
    return f"REHEARSAL of one rollout step: {len(found.ranks)} ranks, no weights; {real}"


def _map(found: "Rehearsal") -> str:
    rows = lines(found.ranks)
    more = [f"... {len(rows) - 1 - ROWS} rows more: --json"] if len(rows) - 1 > ROWS else []
    told = "; ".join(found.crossing) or "no tensor, context or vLLM group crosses nodes"
    return "\n".join(["rank map", aligned(rows[: ROWS + 1]), *more, told])


def _queue(found: "Rehearsal") -> str:
    own = found.sampled
    share = len(own.groups) / own.sent if own.sent else 0.0
    return (
        f"queue: {own.sent:,} prompts sent, {len(own.groups):,} groups kept ({share:.0%}){'' if own.enough else ', FEWER THAN WANTED'}; "
        f"{own.tokens:,} tokens sampled in {own.steps:,} scheduler steps, {own.seconds:.0f} s, "
        f"{own.tail:.0f} of them after the last prompt; "
        f"places without an answer {own.idle:.0%}; {own.preempted:,} answers had to make room in the KV cache"
    )


def _packing(found: "Rehearsal") -> str:
    own = found.batched
    same = "alike" if own.same else "NOT ALIKE"
    return (
        f"packing: {len(own.counts)} updates of {_range(own.counts)} micro-batches of {_range(own.slots)} slots on each of "
        f"{own.plan.layout.data_parallel_size} replicas; fill {own.fill:.1%}, slowest replica by the mean {own.balance:.3f}, "
        f"bubble {own.bubble:.1%} of an update\n"
        f"denominators: {same} on ranks that heard of the answers in another order; summed over all replicas they differ from the plain "
        f"sum by {own.denominators:.1e}"
    )


def _stream(found: "Rehearsal") -> str:
    rows = [["weight stream", "buckets", "GiB a rank sends", "GiB of full tensors"]]
    rows += [
        [f"stage {number}", str(own["buckets"]), gib(own["sent"]), gib(own["full"])] for number, own in enumerate(found.streamed.stages)
    ]
    peak = f"peak on every rank: {found.streamed.peak / 2**20:,.0f} MiB; {gib(found.streamed.nbytes)} GiB in all"
    return f"{aligned(rows)}\n{peak}"


def _checkpoint(found: "Rehearsal") -> str:
    files = found.written.files
    return (
        f"checkpoint: {gib(sum(files.values()))} GiB of {found.written.parameters:,} parameters, in {len(files)} files of "
        f"{gib(min(files.values()))} to {gib(max(files.values()))} GiB, written by ranks {_ranks(sorted(files))}"
    )


def _comparison(found: "Rehearsal") -> str:
    rows = [["", "planner", "rehearsal", "difference"]]
    rows += [[one.name, amount(one.planned), amount(one.found), f"{one.difference:+.1%}"] for one in found.compared]
    return f"{LABEL}\n{aligned(rows)}"


def _range(values: list[int]) -> str:
    if not values:
        return "0"
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} ..." if len(ranks) > 8 else shown

"""A plan as text: tables for a terminal. Every table says that it is an estimate."""

from collections.abc import Iterable

from megatron_nft.planner.hardware import PUBLISHED
from megatron_nft.planner.plan import Plan, gib

LABEL = "ESTIMATE, not measured"
SLOWER = "a real step takes likely some 1.2 times as long: docs/planner.md has published runs beside their plans"
Table = list[list[str]]


def aligned(table: Table) -> str:
    """Columns side by side: the first to the left, the others to the right, but for a last one that is marked by a header of spaces."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    left = {0} | ({len(widths) - 1} if not table[0][-1].strip() or table[0][-1].endswith(" ") else set())
    lines = ("  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def text(plan: Plan) -> str:
    """All of it."""
    parts = [
        head(plan),
        aligned(memory_table(plan)),
        capacity(plan),
        aligned(times_table(plan)),
        rates(plan),
        saves(plan),
        SLOWER,
        verdict(plan),
    ]
    return "\n\n".join(parts)


def short(plan: Plan) -> str:
    """A few lines for `train --dry-run`."""
    fullest = max(plan.memory.phases, key=lambda phase: sum(plan.memory.phases[phase].values()))
    peak = sum(plan.memory.phases[fullest].values())
    memory = f"memory: {gib(peak)} of {gib(plan.memory.limit)} GiB in {fullest}, the fullest phase"
    return "\n".join([head(plan), memory, rates(plan).splitlines()[0], verdict(plan)])


def head(plan: Plan) -> str:
    """What was reckoned with."""
    cluster, rollout = plan.cluster, plan.config.rollout
    served = f", {cluster.engines} servers of {rollout.tensor_parallel_size} GPUs" if rollout.mode == "served" else ""
    engines = f"vLLM TP{rollout.tensor_parallel_size}, {cluster.engines} engines"
    gpus = f"{cluster.nodes} nodes x {cluster.gpus_per_node} {cluster.gpu.name} ({cluster.gpus} GPUs){served}"
    return f"{LABEL}: {plan.model}\n{gpus}; {layout_name(plan)}; {engines}\n{rates_from(plan)}"


def rates_from(plan: Plan) -> str:
    """Whether the seconds rest on published figures or on a measurement."""
    return f"what the GPU achieves: {plan.cluster.gpu.achieved.source}"


def layout_name(plan: Plan) -> str:
    """TP4 CP2 PP2 DP8 VPP2."""
    own = plan.layout
    words = [f"TP{own.tp}", f"CP{own.cp}" * (own.cp > 1), f"PP{own.pp}" * (own.pp > 1), f"DP{own.dp}", f"VPP{own.vpp}" * (own.vpp > 1),
             f"EP{own.ep}" * (own.ep > 1)]  # fmt: skip
    return " ".join(word for word in words if word)


def memory_table(plan: Plan) -> Table:
    """GiB by part and phase, what is free of the limit, and the verdict."""
    held = plan.memory
    columns = dict(held.phases) | ({"servers": held.servers} if held.servers else {})
    parts = list(dict.fromkeys(part for own in columns.values() for part in own))
    parts = [part for part in parts if any(own.get(part) for own in columns.values())]
    rows = [["GiB of the fullest GPU", *columns]]
    rows += [[part, *(gib(own[part]) if own.get(part) else "" for own in columns.values())] for part in parts]
    sums = [sum(own.values()) for own in columns.values()]
    rows.append(["sum", *map(gib, sums)])
    rows.append([f"free of {gib(held.limit)}", *(gib(held.limit - total) for total in sums)])
    rows.append(["fits", *("yes" if total <= held.limit else "NO" for total in sums)])
    return rows


def capacity(plan: Plan) -> str:
    """How much fits."""
    held, config = plan.memory, plan.config
    lines = [
        f"longest response that fits: {held.longest_response:,} tokens (rollout.max_tokens {config.rollout.max_tokens:,})",
        f"largest micro-batch that fits: {held.largest_micro_batch:,} tokens (train.tokens_per_micro_batch "
        f"{config.train.tokens_per_micro_batch:,})",
        f"KV cache: {held.kv_tokens:,} tokens an engine, {held.kv_tokens * plan.cluster.engines:,} in flight over all of them",
    ]
    if held.host:
        what = ", ".join(f"{part} {gib(nbytes)}" for part, nbytes in held.host.items())
        lines.append(f"host memory of a node: {gib(sum(held.host.values()))} GiB ({what})")
    return "\n".join(lines)


def times_table(plan: Plan) -> Table:
    """Seconds of a rollout step by phase, and what they are made of."""
    spent = plan.times
    rows = [["phase", "seconds", "share", "made of "]]
    for phase, seconds in spent.phases.items():
        parts = ", ".join(f"{part} {amount(value)}" for part, value in spent.parts.get(phase, {}).items() if value)
        rows.append([phase, f"{seconds:.1f}", f"{seconds / spent.step:.1%}" if spent.step else "", parts])
    rows.append(["step", f"{spent.step:.1f}", "", ""])
    return rows


def rates(plan: Plan) -> str:
    """The whole run, and further facts."""
    spent = plan.times
    lines = [
        f"{spent.step:.0f} s a rollout step, {spent.tokens_per_gpu:,.0f} sampled tokens/s/GPU; {spent.steps} steps: {_span(spent.days)}, "
        f"{amount(spent.gpu_hours)} GPU-hours"
    ]
    return "\n".join([*lines, *(line for keys, form in FACTS if (line := _fact(spent.facts, keys, form)))])


def _span(days: float) -> str:
    """Days, or hours or minutes where they are less than one."""
    return f"{days:.2f} days" if days >= 1 else f"{24 * days:.1f} hours" if 24 * days >= 1 else f"{1440 * days:.1f} minutes"


# what is said of the facts of planner/times.py: those that it names, in one line together
FACTS = (
    (("groups sent", "groups kept", "sampled tokens", "mean response length", "truncated share"),
     "generating: {:,.0f} groups sent, {:,.0f} kept, {:,.0f} tokens sampled; mean answer {:,.0f} tokens, {:.1%} cut off"),
    (("answers running on an engine", "answers running on an engine, at most", "scheduler steps", "seconds of a scheduler step"),
     "engines: {:.0f} answers at a time on average, {:.0f} at most; {:,.0f} scheduler steps of {:.4f} s"),
    (("updates", "micro-batches", "slots of a micro-batch", "fill", "bubble share", "model flops utilization"),
     "training: {:.0f} updates of {:.3g} micro-batches of {:,.0f} slots, {:.1%} of them filled; bubble {:.1%}; MFU {:.1%}"),
    (("seconds of exposed communication", "bytes synced"),
     "exposed communication: {:.1f} s a step; a sync carries {:.3g} bytes"),
    (("trained tokens a second and GPU",), "trained tokens: {:,.0f} a second and GPU"),
    (("validation seconds",), "a validation: {:.0f} s"),
)  # fmt: skip


def _fact(facts: dict[str, float], keys: tuple[str, ...], form: str) -> str:
    return form.format(*(facts[key] for key in keys)) if all(facts.get(key) is not None for key in keys) else ""


def saves(plan: Plan) -> str:
    """Checkpoints and disk."""
    own = plan.saves
    return (
        f"checkpoint: {gib(own.checkpoint)} GiB in {own.files} files of up to {gib(own.largest_file)}, "
        f"training waits {own.stall:.1f} s for each; "
        f"{own.count} are made, {own.kept} kept\n"
        f"disk of the whole run: at most {gib(own.disk)} GiB (answers {gib(own.answers)}, export {gib(own.export)})"
    )


def verdict(plan: Plan) -> str:
    """One line, or one for each thing that does not fit."""
    return "fits" if plan.fits else "\n".join(f"DOES NOT FIT: {reason}" for reason in plan.reasons)


def comparison(plans: dict[str, Plan]) -> str:
    """Named candidates side by side."""
    columns = {name: _column(plan) for name, plan in plans.items()}
    rows = [["", *columns]]
    rows += [[key, *(column.get(key, "") for column in columns.values())] for key in _keys(columns.values())]
    return f"{LABEL}\n{aligned(rows)}"


def _column(plan: Plan) -> dict[str, str]:
    held, spent, rollout = plan.memory, plan.times, plan.config.rollout
    return {
        "layout": layout_name(plan),
        **({"achieved": measured} if (measured := plan.cluster.gpu.achieved.source) != PUBLISHED else {}),
        "vLLM": f"TP{rollout.tensor_parallel_size} {rollout.quantization or '16 bit'}, share {rollout.gpu_memory_utilization:g}",
        "micro-batch": f"{plan.config.train.tokens_per_micro_batch:,}",
        **{f"GiB in {phase}": gib(sum(parts.values())) for phase, parts in held.phases.items()},
        "GiB that can be used": gib(held.limit),
        "fits": "yes" if plan.fits else "NO",
        "KV tokens in flight": f"{held.kv_tokens * plan.cluster.engines:,}",
        "bubble, s": amount(lost(plan, "bubble")),
        "exposed communication, s": amount(lost(plan, "exposed")),
        **{f"s in {phase}": f"{seconds:.1f}" for phase, seconds in spent.phases.items()},
        "s a step": f"{spent.step:.1f}",
        "sampled tokens/s/GPU": f"{spent.tokens_per_gpu:,.0f}",
        "days": f"{spent.days:.2f}",
    }


def lost(plan: Plan, part: str) -> float:
    """Seconds of a step that all phases together lose to a part of this name."""
    return sum(value for parts in plan.times.parts.values() for name, value in parts.items() if name.startswith(part))


def _keys(columns: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(key for column in columns for key in column))


def amount(value: float) -> str:
    """A number as one reads it: three digits, large ones whole."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"

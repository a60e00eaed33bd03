"""Seconds of a rollout step, phase by phase. All of it is an estimate: docs/planner.md has its formulas and constants, and how far from
published runs it is."""

import math
from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.planner import other_times
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.decoding import Engine
from megatron_nft.planner.generation import Generation, Order, simulate
from megatron_nft.planner.memory import Memory
from megatron_nft.planner.training_time import BUBBLE, EXPOSED, Pass, Shape, Training
from megatron_nft.planner.workload import Workload


@dataclass(frozen=True)
class Times:
    """phases: seconds of a rollout step in "generate", "rewards", "old_logprobs", "train", "sync", "save" (its stall, a step's share) and
    "other"; their sum is `step` where colocated, the longer of both sides where served. parts: of a phase the seconds of what it is made
    of, e.g. {"train": {"matrix products": ..., "attention": ..., "bubble": ..., "exposed: tensor parallel": ...}}. facts: further numbers
    by name."""

    phases: dict[str, float]
    parts: dict[str, dict[str, float]]
    facts: dict[str, float]
    step: float
    tokens_per_gpu: float  # sampled tokens a second and GPU of the whole allocation, those thrown away included; trained ones are in facts
    gpu_hours: float  # of the whole run
    days: float
    steps: int  # rollout steps of the whole run: train.steps, or as many as train.sampled_tokens allow
    stall: float  # seconds that training waits for a save


def times(config: Config, hf: dict, cluster: Cluster, memory: Memory) -> Times:
    """hf: the model's config.json; memory: that of the same config, whose KV cache bounds how many answers run at a time.

    Raises UserError for FP8 on a GPU that has none, and for a layout that does not divide the trainers.
    """
    work, training = Workload.of(config), Training(config, hf, cluster)
    engine = Engine.of(config, hf, cluster, memory.kv_tokens)
    shape = training.shape(work)
    generation = simulate(work, Order.of(config), engine, cluster.engines)
    update, old = training.update(shape), training.old_logprobs(shape, work.updates)
    weights = other_times.sync(config, training)
    every = config.evaluation.interval if config.evaluation.sets else 0
    validation = other_times.validation(config, engine, cluster.engines) / every if every else 0.0
    stall, steps = other_times.save_stall(config, training), _steps(config, generation.sampled)
    parts = {
        "generate": {"until the last group is sent": generation.seconds - generation.tail, "the last answers": generation.tail},
        "rewards": {"the last verdicts": other_times.VERDICTS},
        "old_logprobs": old.seconds,
        "train": update.times(work.updates).seconds,
        "sync": weights.parts,
        "save": {"stall": stall / (config.checkpoint.interval or steps)},
        "other": {"validation": validation, "batching": other_times.BATCHING, "offload": other_times.offload(config, training)},
    }
    phases = {name: float(sum(seconds.values())) for name, seconds in parts.items()}
    step = _step(config, phases)
    sampled = generation.sampled / (step * cluster.gpus)
    facts = _facts(config, training, work, shape, generation, update) | {
        "seconds of exposed communication": _exposed(update, old, work.updates),
        "bytes synced": weights.nbytes,
        "validation seconds": validation * every,
        "trained tokens a second and GPU": work.kept_tokens / (step * cluster.gpus),
    }
    return Times(phases, parts, facts, step, sampled, step * steps * cluster.gpus / 3600, step * steps / 86_400, steps, stall)


def _steps(config: Config, sampled: float) -> int:
    """Of the whole run. sampled: tokens of a step."""
    budget = config.train.sampled_tokens
    return config.train.steps if budget is None else min(config.train.steps, max(1, math.ceil(budget / sampled)))


def _step(config: Config, phases: dict[str, float]) -> float:
    """Served engines write while the trainers train, where answers may be a weight update old; validation and sync stop both."""
    if config.rollout.mode != "served" or not config.rollout.max_staleness:
        return sum(phases.values())
    both = phases["sync"] + phases["other"]
    ours = sum(phases[name] for name in ("rewards", "old_logprobs", "train", "save"))
    return max(phases["generate"], ours) + both


def _exposed(update: Pass, old: Pass, updates: int) -> float:
    return float(sum(part.seconds.get(name, 0.0) * factor for part, factor in ((update, updates), (old, 1)) for name in EXPOSED))


def _facts(config: Config, training: Training, work: Workload, shape: Shape, generation: Generation, update: Pass) -> dict[str, float]:
    tokens = work.kept_tokens
    flops = training.model_flops(tokens, tokens * shape.length)
    train = update.total * work.updates
    gpu, sent = training.gpu, training.bytes_of_collectives(shape)
    facts = {
        "flops of a step": flops,
        "model flops utilization": flops / (train * training.cluster.trainers * gpu.bf16),
        "bubble share": update.seconds.get(BUBBLE, 0.0) / update.total,
        "micro-batches": shape.count,
        "slots of a micro-batch": shape.slots,
        "fill": shape.fill,
        "updates": work.updates,
        "answers running on an engine": generation.running,
        "answers running on an engine, at most": generation.most_running,
        "scheduler steps": generation.steps,
        "seconds of a scheduler step": generation.seconds / generation.steps if generation.steps else 0.0,
        "groups sent": generation.sent,
        "groups kept": generation.kept,
        "answers": generation.sent * work.n,
        "sampled tokens": generation.sampled,
        "tokens read again": generation.reread,
        "kept tokens": tokens,
        "mean response length": work.mean_length,
        "median response length": work.quantile(0.5),
        "90 % of responses below": work.quantile(0.9),
        "truncated share": work.truncated,
    }
    facts |= {f"seconds of exposed {name.removeprefix('exposed: ')} communication": update.seconds.get(name, 0.0) * work.updates
              for name in EXPOSED}  # fmt: skip
    facts |= {f"bytes of {kind} parallel communication": nbytes * work.updates for kind, nbytes in sent.items()}
    return {name: float(value) for name, value in facts.items()}

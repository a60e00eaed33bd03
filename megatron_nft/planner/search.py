"""Layouts that do better, and the nearest mend of one that does not fit.

First the training side: TP x PP x CP x VPP x micro-batch x recompute, ranked by the seconds of training. Then for the best of each
TP x PP x CP the engines' side: vLLM's TP, what leaves the GPU, vLLM's share of the memory, ranked by the seconds of a whole step. What does
not fit is left out before its times are reckoned.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from megatron_nft.config import Config, check
from megatron_nft.errors import UserError
from megatron_nft.planner import tables
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.memory import Memory, memory, slot_multiple
from megatron_nft.planner.models import Model
from megatron_nft.planner.plan import Plan, completed, gib, shortages
from megatron_nft.weights.layouts import Sizes

Changes = dict[str, object]  # dotted key of a setting: value

MOST_CP, LARGEST_SHARE = 8, 0.85  # vLLM's share of the memory that is tried besides the config's own
MOST_OF_A_REPLICA = 32  # ranks that hold one copy of the model
BEST_LAYOUTS = 4  # of the training side, for which the engines' side is tried
OFFLOADS = ("gradients", "optimizer", "all")
TRAIN_PHASES = ("old_logprobs", "train")


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    plan: Plan
    changes: Changes  # against the config that was given
    why: str  # what it does better, in words

    @property
    def overrides(self) -> str:
        """To paste behind the command."""
        return written(self.changes)


def search(given: Plan, count: int = 5, progress: bool = False) -> list[Found]:
    """The fastest layouts for the config and cluster of a plan, one for each TP x PP x CP, fastest first; its own among them where it is
    one of them. None where nothing fits. progress: a bar on stderr."""
    ranked = _training_side(given, progress)
    found = _engines_side(given, ranked, progress)
    return [Found(one, changes, _why(given, one, changes)) for one, changes in found[:count]]


def written(changes: Changes) -> str:
    """As overrides of the command line."""
    return " ".join(f"{key}={_value(value)}" for key, value in changes.items())


def changed(config: Config, changes: Changes) -> Config:
    """A copy with other values. Raises UserError where they do not go together."""
    other = copy.deepcopy(config)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        setattr(getattr(other, section), name, value)
    check(other)
    return other


def mend(given: Plan, progress: bool = False) -> str:
    """The nearest change with which a plan that does not fit does: the fastest change of one setting, else the best layout."""
    fitting = [one for changes in _single_changes(given) if (one := _tried(given, changes))]
    if fitting:
        best = min(fitting, key=lambda one: one.times.step)
        return f"set {written(_against(given.config, best.config))}, which fits with {gib(_headroom(best))} GiB to spare (estimate)"
    if layouts := search(given, 1, progress):
        return f"the best layout found is {layouts[0].overrides}"
    return "no layout was found that fits: use more nodes, GPUs with more memory, or a lower rollout.max_tokens"


# ---- the training side


def _training_side(given: Plan, progress: bool) -> list[tuple[float, Changes]]:
    """(seconds, changes) of the best of each TP x PP x CP, fastest first."""
    best: dict[tuple, tuple[float, Changes]] = {}
    for shape in tqdm(list(_shapes(given)), desc="layouts", disable=not progress, leave=False):
        for seconds, changes in _of_shape(given, *shape):
            if shape[:3] not in best or seconds < best[shape[:3]][0]:
                best[shape[:3]] = seconds, changes
    return sorted(best.values(), key=lambda item: item[0])


def _shapes(given: Plan) -> Iterator[tuple[int, int, int, int | None]]:
    """TP, PP, CP and VPP that the sizes of the model and of the cluster allow."""
    sizes, trainers, own = Sizes.of(given.hf), given.cluster.trainers, given.layout
    for tp, pp, cp in itertools.product(_tensor_sizes(sizes, given.cluster), _divisors(sizes.layers), _powers(MOST_CP)):
        if trainers % (tp * pp * cp) or tp * pp * cp > MOST_OF_A_REPLICA or own.ep > 1 and trainers % (own.ep * own.etp * pp):
            continue
        yield from ((tp, pp, cp, vpp) for vpp in _virtual_sizes(sizes.layers, pp))


def _of_shape(given: Plan, tp: int, pp: int, cp: int, vpp: int | None) -> Iterator[tuple[float, Changes]]:
    """(seconds of training, changes) of the shortest and the longest micro-batch that fit; with recompute only where without it the longest
    does not. Everything is off the GPU while the engines run: whether those have room is asked later, for the few that are left."""
    counts = _token_counts(given.config, tp, cp)
    for recompute in (None, "selective", "full"):
        tried = [_training_change(given.config, tp, pp, cp, vpp, tokens, recompute) for tokens in counts]
        try:
            held = _memory(given, tried[0])
            fitting = [changes for tokens, changes in zip(counts, tried) if tokens <= held.largest_micro_batch]
            for changes in fitting[:1] + fitting[1:][-1:]:
                yield _training_seconds(given, changes, held), changes
        except UserError:
            return
        if len(fitting) == len(counts):
            return


def _memory(given: Plan, changes: Changes) -> Memory:
    config = changed(given.config, changes | {"train.offload": "all"})
    return memory(config, given.hf, Cluster.of(config))


def _training_seconds(given: Plan, changes: Changes, held: Memory) -> float:
    config = changed(given.config, changes | {"train.offload": "all"})
    one = completed(config, Model(given.hf, given.model), Cluster.of(config), held)
    return sum(one.times.phases.get(phase, 0.0) for phase in TRAIN_PHASES)


def _training_change(config: Config, tp: int, pp: int, cp: int, vpp: int | None, tokens: int, recompute: str | None) -> Changes:
    same, joined = config.train.recompute_granularity == recompute, config.train.logprob_tokens_per_micro_batch
    return {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "parallel.context_parallel_size": cp,
        "parallel.virtual_pipeline_model_parallel_size": vpp,
        "parallel.sequence_parallel": tp > 1,
        "train.tokens_per_micro_batch": tokens,
        "train.logprob_tokens_per_micro_batch": joined and max(joined, tokens),
        "train.recompute_granularity": recompute,
        **{f"train.{name}": getattr(config.train, name) if same else None for name in
           ("recompute_method", "recompute_num_layers", "recompute_modules")},
    }  # fmt: skip


def _tensor_sizes(sizes: Sizes, cluster: Cluster) -> list[int]:
    """A group stands within a node, and every rank has as many heads of each kind."""
    each = cluster.gpus_per_node
    common = math.gcd(sizes.heads, sizes.groups, sizes.ffn)
    return [tp for tp in _divisors(each) if common % tp == 0]


def _virtual_sizes(layers: int, pp: int) -> list[int | None]:
    return [None, *(vpp for vpp in (2, 4) if pp > 1 and layers % (pp * vpp) == 0)]


def _token_counts(config: Config, tp: int, cp: int) -> list[int]:
    """The config's own micro-batch, the shortest possible, and multiples of it, as all ranks can share them."""
    least = config.data.max_prompt_length + config.rollout.max_tokens
    multiple = slot_multiple(tp, cp)
    return sorted({-(-tokens // multiple) * multiple for tokens in (config.train.tokens_per_micro_batch, least, 2 * least, 4 * least)})


# ---- the engines' side


def _engines_side(given: Plan, ranked: list[tuple[float, Changes]], progress: bool) -> list[tuple[Plan, Changes]]:
    """The best of each of the ranked layouts, fastest first."""
    best = ranked[:BEST_LAYOUTS]
    tries = [(number, changes | more) for number, (_, changes) in enumerate(best) for more in _engine_changes(given)]
    fastest: dict[int, Plan] = {}
    for number, changes in tqdm(tries, desc="engines", disable=not progress, leave=False):
        one = _tried(given, changes)
        if one is not None and (number not in fastest or one.times.step < fastest[number].times.step):
            fastest[number] = one
    if given.fits:  # a change has to be worth it
        number = next((n for n, one in fastest.items() if _shape(one) == _shape(given)), len(best))
        if number not in fastest or given.times.step <= fastest[number].times.step:
            fastest[number] = given
    found = sorted(fastest.values(), key=lambda one: one.times.step)
    return [(one, _against(given.config, one.config)) for one in found]


def _engine_changes(given: Plan) -> Iterator[Changes]:
    rollout = given.config.rollout
    sizes = _tensor_sizes(Sizes.of(given.hf), given.cluster) if rollout.mode == "colocated" else [rollout.tensor_parallel_size]
    shares = {rollout.gpu_memory_utilization, LARGEST_SHARE} if rollout.mode == "colocated" else {rollout.gpu_memory_utilization}
    for tp, offload, share in itertools.product(sizes, OFFLOADS, sorted(shares)):
        if given.cluster.trainers % tp == 0 or rollout.mode == "served":
            yield {"rollout.tensor_parallel_size": tp, "train.offload": offload, "rollout.gpu_memory_utilization": share}


# ---- the nearest mend


def _single_changes(given: Plan) -> Iterator[Changes]:
    """Changes of one setting, of which any might do."""
    config = given.config
    most = given.memory.largest_micro_batch
    if config.data.max_prompt_length + config.rollout.max_tokens <= most < config.train.tokens_per_micro_batch:
        yield {"train.tokens_per_micro_batch": most}
    for offload in OFFLOADS:
        yield {"train.offload": offload}
    for recompute in ("selective", "full"):
        if config.train.recompute_granularity is None:
            yield {"train.recompute_granularity": recompute}
    share = round(config.rollout.gpu_memory_utilization, 2)
    for number in range(1, 9):
        for other in (share - 0.05 * number, share + 0.05 * number):
            if 0.1 < other < 0.95:
                yield {"rollout.gpu_memory_utilization": round(other, 2)}
    if not config.optimizer.optimizer_cpu_offload:
        yield {"optimizer.optimizer_cpu_offload": True}
    if config.train.logprob_tokens_per_micro_batch:
        yield {"train.logprob_tokens_per_micro_batch": None}


# ---- both


def _tried(given: Plan, changes: Changes) -> Plan | None:
    """The plan with the changes; None where they do not go together, do not suit the model or do not fit."""
    try:
        config = changed(given.config, changes)
        cluster = Cluster.of(config)
        held = memory(config, given.hf, cluster)
        if shortages(config, held):
            return None
        return completed(config, Model(given.hf, given.model), cluster, held)
    except UserError:
        return None


def _against(config: Config, other: Config) -> Changes:
    """The settings in which the second differs."""
    sections = ("parallel", "train", "rollout", "optimizer")
    pairs = [(f"{section}.{name}", value, getattr(getattr(config, section), name)) for section in sections
             for name, value in vars(getattr(other, section)).items()]  # fmt: skip
    return {key: value for key, value, was in pairs if value != was}


def _why(given: Plan, one: Plan, changes: Changes) -> str:
    """What is better and what is worse than in the given plan."""
    if not changes:
        return "the config's own"
    now, was = one.times, given.times
    said = [] if given.fits else ["it fits"]
    for part, name in (("bubble", "bubble"), ("exposed", "exposed communication")):
        said += _compared(name, tables.lost(one, part), tables.lost(given, part), "s")
    for phase in dict.fromkeys([*now.phases, *was.phases]):
        said += _compared(phase, now.phases.get(phase, 0.0), was.phases.get(phase, 0.0), "s")
    tokens = [p.memory.kv_tokens * p.cluster.engines for p in (one, given)]
    said += _compared("KV cache", *tokens, "tokens in flight", more_is_better=True)
    return "; ".join(said) or "as fast"


def _compared(name: str, now: float, was: float, unit: str, more_is_better: bool = False) -> list[str]:
    """Where the difference is a tenth at least, and is one that is seen."""
    if max(now, was) <= 0 or abs(now - was) < 0.1 * max(now, was) or (unit == "s" and abs(now - was) < 0.5):
        return []
    word = ("more" if now > was else "less") + f" {name}"
    return [f"{word}: {tables.amount(now)} {unit} for {tables.amount(was)}"]


def table(given: Plan, found: list[Found]) -> str:
    """The layouts found, the config's own first, with the overrides to paste and why."""
    rows = [
        ["layout", "vLLM", "micro-batch", "recompute", "offload", "GiB at most", "bubble s", "exposed s", "generate s", "train s", "step s"]
    ]
    rows += [_row(name, one) for name, one in [("given", given), *((str(n + 1), f.plan) for n, f in enumerate(found))]]
    texts = [f"{number + 1}. {one.why}\n   {one.overrides or '(no change)'}" for number, one in enumerate(found)]
    return "\n".join([f"{tables.LABEL}: layouts, fastest first", tables.aligned(rows), "", *texts])


def _row(name: str, one: Plan) -> list[str]:
    rollout, train, held, phases = one.config.rollout, one.config.train, one.memory, one.times.phases
    peak = max(sum(parts.values()) for parts in held.phases.values())
    return [
        f"{name}: {tables.layout_name(one)}", f"TP{rollout.tensor_parallel_size}, {rollout.gpu_memory_utilization:g}",
        f"{train.tokens_per_micro_batch:,}", train.recompute_granularity or "none", train.offload or "gradients",
        f"{gib(peak)}{'' if one.fits else ' NO'}", f"{tables.lost(one, 'bubble'):.1f}", f"{tables.lost(one, 'exposed'):.1f}",
        f"{phases.get('generate', 0):.1f}", f"{phases.get('train', 0):.1f}", f"{one.times.step:.1f}",
    ]  # fmt: skip


def _shape(one: Plan) -> tuple[int, int, int]:
    return one.layout.tp, one.layout.pp, one.layout.cp


def _headroom(one: Plan) -> int:
    return min(one.memory.limit - sum(parts.values()) for parts in one.memory.phases.values())


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]

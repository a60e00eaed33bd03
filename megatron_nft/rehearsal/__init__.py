"""A rehearsal: the full control path of a rollout step for every rank of a config's cluster, on one machine, without weights.

Megatron's own groups and model (on the meta device, policy/absent.py) give the rank map, the weight stream and the checkpoint; the real
queue (rollout/queue.py) is driven by engines of drawn lengths; the real packing makes every replica's micro-batches. What comes out is put
beside what the planner says. It stands at the trainer's level and not in planner/, because it uses rollout/ and policy/, which the
planner must not know; all seconds come from the planner's model of the hardware, so only the control path is checked, not that model.
"""

from dataclasses import asdict, dataclass

import numpy as np

from megatron_nft.planner.plan import Plan
from megatron_nft.planner.training_time import BUBBLE, Shape, Training
from megatron_nft.policy import absent, micro_batches
from megatron_nft.rehearsal import batches, streams
from megatron_nft.rehearsal.batches import Batched
from megatron_nft.rehearsal.ranks import Rank, crossing, rank_map
from megatron_nft.rehearsal.sampling import Sampled, sample
from megatron_nft.rehearsal.streams import Streamed, Written

SAME = 0.005  # relative difference up to which two numbers are called the same


@dataclass(frozen=True)
class Compared:
    """A number as the planner has it, and as the rehearsal found it."""

    name: str
    planned: float
    found: float

    @property
    def difference(self) -> float:
        """Of the rehearsal's, relative to the planner's."""
        return (self.found - self.planned) / self.planned if self.planned else float(self.found != 0)


@dataclass(frozen=True)
class Rehearsal:
    """What came of it."""

    plan: Plan
    ranks: list[Rank]
    crossing: list[str]
    sampled: Sampled
    batched: Batched
    streamed: Streamed
    written: Written
    seconds: dict[str, float]  # of a rollout step, by phase
    bubble: float  # seconds of a step
    compared: list[Compared]

    def as_dict(self) -> dict:
        """All of it, fit for JSON."""
        sampled = {key: value for key, value in vars(self.sampled).items() if key != "groups"}
        batched = {key: getattr(self.batched, key) for key in ("counts", "slots", "fill", "balance", "bubble", "same", "denominators")}
        return {
            "ranks": [asdict(rank) for rank in self.ranks],
            "crossing": self.crossing,
            "sampled": sampled,
            "batched": batched,
            "sync": asdict(self.streamed),
            "checkpoint": asdict(self.written),
            "seconds": self.seconds,
            "bubble": self.bubble,
            "compared": [asdict(one) | {"difference": one.difference} for one in self.compared],
        }

    def text(self) -> str:
        """As tables."""
        from megatron_nft.rehearsal.tables import text

        return text(self)


def rehearse(plan: Plan) -> Rehearsal:
    """Drive a rollout step of a plan's config. Raises UserError where Megatron or the queue refuse it."""
    config, cluster, layout = plan.config, plan.cluster, plan.layout
    places = absent.places(config.parallel, cluster.trainers)
    ranks = streams.ranks_of_stages(plan, places)
    sampled = sample(config, plan.hf, cluster, plan.memory.kv_tokens)
    packing = micro_batches.layout(config, plan.hf, places[0], config.train.prompts_per_update)
    batched = batches.batch(config, sampled.groups, packing, layout.pp, layout.vpp)
    streamed, written = streams.sync(plan, ranks), streams.checkpoint(plan, ranks)
    seconds, bubble = _seconds(plan, sampled, batched)
    mapped = rank_map(config, cluster, places)
    compared = _compared(plan, sampled, batched, streamed, written, seconds, bubble, ranks)
    return Rehearsal(plan, mapped, crossing(mapped, config), sampled, batched, streamed, written, seconds, bubble, compared)


def _seconds(plan: Plan, sampled: Sampled, batched: Batched) -> tuple[dict[str, float], float]:
    """By phase, and the bubble's: the planner's hardware, the rehearsal's micro-batches and scheduler steps."""
    training = Training(plan.config, plan.hf, plan.cluster)
    shapes = [Shape.of(batched.answers.lengths, mini.micro_batches, mini.slots) for mini in batched.plan.mini_batches]
    updates = [training.update(shape) for shape in shapes]
    old = [training.old_logprobs(shape, 2).total for shape in shapes[1:]]  # 2: the pass over one mini-batch behind the first
    found = {"generate": sampled.seconds, "old_logprobs": float(sum(old)), "train": float(sum(one.total for one in updates))}
    phases = {name: found.get(name, seconds) for name, seconds in plan.times.phases.items()}
    return phases, float(sum(one.seconds.get(BUBBLE, 0.0) for one in updates))


def _compared(plan, sampled, batched, streamed, written, seconds, bubble, ranks) -> list[Compared]:
    """Side by side. What the planner's facts do not name is left out."""
    facts, held = plan.times.facts, plan.memory.facts
    rows = [
        ("groups sent", facts.get("groups sent"), sampled.sent),
        ("sampled tokens", facts.get("sampled tokens"), sampled.tokens),
        ("scheduler steps", facts.get("scheduler steps"), sampled.steps),
        ("micro-batches of an update", facts.get("micro-batches"), float(np.mean(batched.counts or [0]))),
        ("slots of a micro-batch", facts.get("slots of a micro-batch"), float(np.mean(batched.slots or [0]))),
        ("fill", facts.get("fill"), batched.fill),
        ("bubble, seconds", sum(parts.get(BUBBLE, 0.0) for parts in (plan.times.parts.get("train", {}),)), bubble),
        ("parameters of the fullest rank", held.get("parameters of a rank"), max(rank.parameters for rank in ranks)),
        ("bytes synced", held.get("synced bytes"), streamed.nbytes),
        ("checkpoint, bytes", plan.saves.checkpoint, sum(written.files.values())),
        *((f"{phase}, seconds", plan.times.phases[phase], seconds[phase]) for phase in ("generate", "old_logprobs", "train")),
        ("step, seconds", plan.times.step, plan.times.step + sum(seconds[p] - plan.times.phases[p] for p in seconds)),
    ]
    return [Compared(name, float(planned), float(found)) for name, planned, found in rows if planned is not None]

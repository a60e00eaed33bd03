"""A plan beside what a run measured, phase by phase: how far off the model of times and memory is, and how far the workload it was told."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.planner import parameters, tables
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.hardware import known
from megatron_nft.planner.memory import memory
from megatron_nft.planner.places import check
from megatron_nft.planner.plan import GIB, Plan, completed
from megatron_nft.planner.run_rows import LEFT_OUT, Answered, RunRows, with_workload

GOAL = 0.10  # error of the time model, and of memory
# of a phase's parts, what torch's counter does not see: others allocate it
_NOT_TORCHS = {"NCCL and CUDA", "CUDA graphs", "vLLM libraries", "vLLM, asleep"}
_SLEEPS = ("vLLM weights", "KV cache")
_MEMORY = {"generate": "generate", "old_logprobs": "old_logprobs", "train": "train", "sync": "sync", "checkpoint": "save"}
NOTES = """error: (plan - measured) / measured; with the stated workload it holds the error of that guess, too, with the run's own it is the
model's alone, to which the goal applies. memory: what torch counts on the first rank, beside the plan's fullest GPU without CUDA,
NCCL and vLLM's libraries; torch goes on counting what of vLLM sleeps."""
Figures = dict[str, tuple[float, str]]  # by name: value, unit


@dataclass(frozen=True)
class Line:
    """One figure: as measured, as planned with the workload that the config states, and with the run's own."""

    name: str
    unit: str
    measured: float
    stated: float
    fitted: float | None  # None: the run does not tell its workload

    @property
    def error(self) -> float | None:
        """Of the model: its own workload's plan, relative to what was measured."""
        return _error(self.stated if self.fitted is None else self.fitted, self.measured)

    @property
    def met(self) -> bool | None:
        """Whether the model is within the goal."""
        return None if self.error is None else abs(self.error) <= GOAL

    def as_dict(self) -> dict:
        """For JSON; errors are shares, above 0 where the plan says too much."""
        return {
            "name": self.name, "unit": self.unit, "measured": self.measured,
            "planned_with_stated_workload": self.stated, "error_with_stated_workload": _error(self.stated, self.measured),
            "planned_with_measured_workload": self.fitted, "error": self.error, "goal": GOAL, "met": self.met,
        }  # fmt: skip


def _error(planned: float, measured: float) -> float | None:
    return planned / measured - 1 if measured else None


@dataclass(frozen=True)
class Against:
    """A plan and a run, side by side."""

    plan: Plan  # with the stated workload
    device: str
    right_device: bool  # the run was on the GPU that the plan is for
    run_dir: str
    steps: int  # that count
    lines: list[Line]
    workload: list[Line]
    other_settings: list[str] = field(default_factory=list)

    def heading(self) -> str:
        """What is compared; of a run on another device, first of all that."""
        gpu = self.plan.cluster.gpu.name
        foreign = "" if self.right_device else f"NOT A COMPARISON OF HARDWARE: the run was on {self.device}, the plan is for {gpu}\n"
        own = (
            f"{foreign}plan (estimate; {tables.rates_from(self.plan)}) against {self.run_dir} on {self.device}: "
            f"medians of {self.steps} steps, the first {LEFT_OUT} left out"
        )
        others = f"\nthe run had other settings than this config: {', '.join(self.other_settings)}" if self.other_settings else ""
        return own + others

    def text(self) -> str:
        """For a terminal."""
        parts = [self.heading()]
        if self.workload:
            parts.append(tables.aligned(_workload_table(self.workload)))
        parts.append(tables.aligned(_table(self.lines)))
        parts.append(NOTES)
        return "\n\n".join(parts)

    def as_dict(self) -> dict:
        """For JSON. Seconds, bytes, tokens."""
        return {
            "estimate": True, "achieved": self.plan.cluster.gpu.achieved.source, "device": self.device, "right_device": self.right_device,
            "run_dir": self.run_dir, "steps": self.steps, "left_out": LEFT_OUT, "other_settings": self.other_settings,
            "workload": [line.as_dict() for line in self.workload], "lines": [line.as_dict() for line in self.lines],
        }  # fmt: skip


def compare(config: Config, run_dir: Path, any_device: bool = False) -> Against:
    """Raises UserError for no run, one of another model or number of GPUs, and, unless any_device, one that was not on plan.gpu."""
    model, cluster, rows = check(config), Cluster.of(config), RunRows(run_dir)
    device, right = _device(rows, cluster, any_device)
    _check_model(rows, parameters.total(model.hf))
    held = memory(config, model.hf, cluster)

    def planned(settings: Config) -> Plan:
        return completed(settings, model, cluster, held)

    stated, answered = planned(config), rows.answered(config.rollout.n)
    fitted, of_training = None, None
    if answered:
        fitted = planned(with_workload(config, answered.response, answered))
        of_training = planned(with_workload(config, answered.kept_response, answered))
    own = _figures(stated, stated)
    theirs = _figures(fitted, of_training) if fitted else {}
    measured = _measured(rows, config)
    lines = [Line(name, unit, value, own[name][0], theirs[name][0] if name in theirs else None)
             for name, (value, unit) in measured.items() if name in own]  # fmt: skip
    workload = _workload(stated, fitted, answered) if answered else []
    return Against(stated, device, right, str(run_dir), len(rows.rows), lines, workload, rows.other_settings(config))


def _device(rows: RunRows, cluster: Cluster, any_device: bool) -> tuple[str, bool]:
    """The run's device in words, and whether it is the plan's."""
    device, ranks = rows.machine.get("device"), rows.machine.get("ranks")
    right = device is not None and known(device) == cluster.gpu.name
    if not right and not any_device:
        told = f"was on {device}" if device else "does not say on what it was"
        named = known(device) if device else None
        mend = f"set plan.gpu={named}" if named else "give --any-device to see the figures all the same"
        raise UserError(f"the run {told}, and the plan is for {cluster.gpu.name}", mend)
    if ranks is not None and ranks != cluster.trainers:
        raise UserError(
            f"the run had {ranks} ranks, the plan has {cluster.trainers} GPUs that train", "set plan.nodes and plan.gpus_per_node"
        )
    return device or "a device that it does not name", right


def _check_model(rows: RunRows, planned: int) -> None:
    """A model is known by its size: its path may have changed since."""
    ran = rows.machine.get("parameters")
    if ran is not None and ran != planned:
        raise UserError(f"the run's model has {ran:,} parameters, the plan's {planned:,}", "set model.path to a model of the run's shape")


def _figures(generating: Plan, training: Plan) -> Figures:
    """What a plan says, by the names of `_measured`. What leaves the GPU does so at the end of `sync`, and comes back in `train`."""
    spent, trained = generating.times, training.times
    half = spent.parts["other"]["offload"] / 2
    seconds = {
        "generate": spent.phases["generate"],
        "rewards": spent.phases["rewards"],
        "batching": spent.parts["other"]["batching"],
        "old_logprobs": trained.phases["old_logprobs"],
        "train": trained.phases["train"] + half,
        "sync": spent.phases["sync"] + half,
        "a validation": spent.facts["validation seconds"],
        "a save": spent.stall,
    }
    ours = trained.phases["old_logprobs"] + trained.phases["train"]
    usual = spent.phases["old_logprobs"] + spent.phases["train"]
    hidden = generating.config.rollout.mode == "served" and generating.config.rollout.max_staleness > 0
    step = spent.step - spent.parts["other"]["validation"] - (0.0 if hidden else spent.phases["save"] + usual - ours)
    found = {name: (value, "s") for name, value in seconds.items()}
    found["step, without validation and saves"] = step, "s"
    rate = spent.facts["sampled tokens"] / step
    found["sampled tokens"] = rate, "tokens/s"
    found["sampled tokens of a GPU"] = rate / generating.cluster.gpus, "tokens/s"
    return found | {f"memory in {stage}": (_torch_counts(generating, phase) / GIB, "GiB") for stage, phase in _MEMORY.items()}


def _torch_counts(plan: Plan, phase: str) -> float:
    """Bytes. A colocated engine's weights and cache stay in torch's count while they sleep."""
    parts = plan.memory.phases[phase]
    asleep = {name: plan.memory.phases["generate"].get(name, 0) for name in _SLEEPS}
    return sum(nbytes for name, nbytes in (asleep | parts).items() if name not in _NOT_TORCHS)


def _measured(rows: RunRows, config: Config) -> Figures:
    times = {name: f"time/{name}" for name in ("generate", "rewards", "batching", "old_logprobs", "train", "sync")}
    times |= {"a validation": "time/validate", "a save": "time/checkpoint"}
    found = {name: (value, "s") for name, key in times.items() if (value := rows.median(key)) is not None}
    gpus, rate = Cluster.of(config).gpus, rows.tokens_per_second()
    found["step, without validation and saves"] = rows.bare_seconds(), "s"
    found["sampled tokens"] = rate, "tokens/s"
    found["sampled tokens of a GPU"] = rate / gpus, "tokens/s"
    peaks = {f"memory in {stage}": rows.median(f"memory/{stage}") for stage in _MEMORY}
    return found | {name: (value / GIB, "GiB") for name, value in peaks.items() if value is not None}


def _workload(stated: Plan, fitted: Plan, answered: Answered) -> list[Line]:
    """What the config states, what the run had, and what a plan makes of that."""
    facts = {
        "mean response length": ("tokens", answered.response),
        "groups sent": ("groups", answered.sent),
        "groups kept": ("groups", answered.kept),
        "sampled tokens": ("tokens", answered.sampled),
    }
    return [Line(name, unit, value, stated.times.facts[name], fitted.times.facts[name]) for name, (unit, value) in facts.items()]


def _workload_table(lines: list[Line]) -> tables.Table:
    header = ["workload of a step", "measured", "stated", "error", "planned from the run's own"]
    return [header, *([f"{line.name}, {line.unit}", tables.amount(line.measured), tables.amount(line.stated),
                       _percent(_error(line.stated, line.measured)), tables.amount(line.fitted)] for line in lines)]  # fmt: skip


def _table(lines: list[Line]) -> tables.Table:
    header = ["", "measured", "stated workload", "error", "the run's own workload", "error", f"goal {GOAL:.0%}"]
    return [header, *(_row(line) for line in lines)]


def _row(line: Line) -> list[str]:
    told = {None: "", True: "met", False: "MISSED"}[line.met]
    fitted = ["", ""] if line.fitted is None else [tables.amount(line.fitted), _percent(line.error)]
    return [f"{line.name}, {line.unit}", tables.amount(line.measured), tables.amount(line.stated),
            _percent(_error(line.stated, line.measured)), *fitted, told]  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:+.1%}"

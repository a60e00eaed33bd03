"""The training loop, Algorithm 1 of arXiv 2505.18116. Every rank runs it."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

from megatron_nft import batching, fitting, objectives, policy, prompts, rollout, saves, watchdog
from megatron_nft.balance import Balance
from megatron_nft.config import Config, check_budget, max_model_len, save
from megatron_nft.errors import gpus_elsewhere
from megatron_nft.evaluation import evaluate
from megatron_nft.files import write_whole
from megatron_nft.logbook import MACHINE, Logbook, check_writable, held, remove_later
from megatron_nft.policy import checkpoint, exchange
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rewards import Judge
from megatron_nft.selfcheck import SelfCheck
from megatron_nft.stopping import Stopped, StopRequest
from megatron_nft.trajectories import Batch, Group


def train(config: Config, stop: StopRequest) -> None:
    """Post-train config.model.path on config.data.train; everything that is written goes to config.run_dir.

    Raises Stopped, with the state saved, where `stop` asks for it before the last step has ended.
    """
    with policy.memory_told(config.run_dir), Run(config, stop) as run:
        for step in run.steps():
            with run.log.stage("generate"):  # a^1..a^K ~ pi_old for prompts q ~ D, until enough groups have 0 < r̂ < 1
                groups = run.sample(step)
            with run.log.stage("batching"):  # w(q) or A, the denominators, and who trains which answer
                mini_batches = run.batch(groups)
            with run.log.stage("old_logprobs"):  # pi_old(a_t | q, a_<t)
                measured = run.set_old_logprobs(mini_batches)
            with run.log.stage("train"):  # NFT: L = - sum w(q) [r log R + (1 - r) log max_v((1 - r̂ R) / (1 - r̂), eps)]
                updates = [run.update(batches, on_policy=number == 0) for number, batches in enumerate(mini_batches)]
            with run.log.stage("sync"):  # pi_old <- pi_theta
                run.sync(step)
            run.finish_step(step, updates, measured)
        run.finish()


def dry_run(config: Config) -> None:
    """Check everything that can be checked without a model in memory, and print what was found. Settings for GPUs pass without one."""
    with gpus_elsewhere() as noted:
        given = Given.load(config)
    for problem in noted:
        print(f"for a machine with GPUs: {problem}")
    if not config.replay:
        Judge.for_config(config).close()
    print(f"{len(given.prompts)} training prompts, dropped: {given.prompts.dropped}; {given.prompts.length_table}")
    for name, own in given.validation.items():
        print(f"{len(own)} validation problems in {name}, dropped: {own.dropped}; {own.length_table}")
    first = given.prompts[0]
    text = prompts.load_tokenizer(config.model.path).decode(first.token_ids)
    print(f"the prompt {first.id}, gold {' | '.join(first.golds)}:\n{text}\n(end of the prompt)")
    print(f"would {f'resume from {given.checkpoint}' if given.checkpoint else 'start'} in {config.run_dir}")


@dataclass
class Given:
    """What the user gave, found to be there and to fit together before anything heavy starts."""

    prompts: PromptSet
    validation: dict[str, PromptSet]
    checkpoint: Path | None  # to resume from

    @classmethod
    def load(cls, config: Config) -> Self:
        """Raises UserError for whatever is missing or does not fit."""
        policy.check_machine()
        found = checkpoint.find(config, "train")
        check_together(config)
        saves.check(config)
        policy.check(config, max_model_len(config))
        fitting.check_trainer(config, sampling=True)
        fitting.warn(config)
        tokenizer = prompts.load_tokenizer(config.model.path)
        training = prompts.load_prompts(config.data.train, tokenizer, config.data)
        if config.replay:
            rollout.check_replay(config, tokenizer)
            return cls(training, {}, found)
        return cls(training, prompts.load_sets(config.evaluation.sets, tokenizer, config.data), found)


def check_together(config: Config) -> None:
    """Raise UserError for settings that are right each by itself and wrong together or on this machine."""
    check_budget(config)
    rollout.check(config, policy.world_size())
    policy.check_profiled_ranks(config)
    check_writable(config.run_dir)


class Run:
    """The parts of a training run, put together and, where the run directory has a checkpoint, resumed from it.

    What is saved is always the state after a whole step: a step that is given up leaves nothing of itself, and is made again.
    """

    def __init__(self, config: Config, stop: StopRequest):
        given = Given.load(config)
        self.stop = stop
        self.config, self.run_dir, self.validation = config, Path(config.run_dir), given.validation
        self._open = ExitStack()
        self.judge = None if config.replay else self._open.enter_context(Judge.for_config(config))
        self._open.enter_context(held(self.run_dir))
        self.topology = policy.initialize(config.parallel, config.seed)
        self._open.callback(policy.shutdown)
        self.profiler = policy.Profiler(config, self.topology.rank)
        self.policy = policy.Policy(config, self.topology)
        self.objective = partial(objectives.loss, settings=config.objective)
        self.cursor = Cursor(given.prompts, config.seed, config.data.shuffle, config.data.most_skipped)
        self.first_step = self.tokens = 0  # tokens: sampled so far
        self.state: dict = {}
        self.carried: list[Group] = []  # with self.state: the sampler's groups that go on in the next step
        self.watch: policy.Watch  # R and c of some answers of the step at hand
        self.validated: tuple[int, dict[str, float]] = (-1, {})  # the last validation: after which step, and what it gave
        loaded = None
        if given.checkpoint:
            loaded, self.state = self.policy.load_newest(given.checkpoint)
            rollout.check_resumed(config, self.state["sampler"])  # before anything of the run is written over
            self.first_step, self.tokens = self.state["step"], self.state["tokens"]
            self.cursor.load_state_dict(self.state["cursor"])
        self.policy.offload()  # what the engine finds free it takes
        self.log = self._open.enter_context(self._open_log())
        self.saves = saves.Saves(self.policy, config, self.log, self.topology.is_first)
        self.policy.offload()  # the engine measures the memory that is free
        precision = policy.precision_of(config.model.precision)
        parts = (precision, self.judge, self.cursor, stop.agreed, self.policy.hand_over, self.log.note)
        self.engine, self.sampler = rollout.start(config, *parts)
        self._open.callback(self.engine.close)
        self._open.callback(self.sampler.close)
        if self.engine.rounds_head:
            self.log.note("this vLLM rounds its logits to 16 bits (it has no head_dtype), the trainer does not: watch logprob_difference")
        self.engine.scale_cache_by(given.prompts.prompts)
        if loaded:
            self.sampler.load(self.state["sampler"], loaded)
            self.carried = self.sampler.carried()
        else:
            self._note_state(0)
        self.check = SelfCheck(self.policy, self.engine, given.prompts.prompts, config)
        self.sync(self.first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        with self._open:
            if isinstance(error, Stopped):
                raise Stopped(self._save_for_later()) from None

    def _open_log(self) -> Logbook:
        first, config = self.topology.is_first, self.config
        if first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save(config, self.run_dir / "config.yaml")
            ran_on = {"device": policy.device_name(), "ranks": self.topology.world_size, "kernels": policy.kernels(config)}
            write_whole(self.run_dir / MACHINE, json.dumps(ran_on | {"parameters": self.policy.table.parameters()}, indent=1) + "\n")
            remove_later(self.run_dir / "rollouts", self.first_step)
            remove_later(self.run_dir / "evaluations", self.first_step)
        log = Logbook(
            config.run_dir,
            config.objective.name,
            config.train.steps,
            self.first_step,
            config.logging,
            asdict(config),
            enabled=first,
            meter=policy.PeakMemory(),
            row=self.state.get("row"),
            balance=Balance(policy.gathered, policy.hosts()),
            around=self._around,
        )
        log.note(f"{len(self.cursor.prompts)} prompts{self.cursor.prompts.told}; {policy.kernels(config)}")
        if self.first_step:
            log.note(f"resumed after step {self.first_step}")
        return log

    @contextmanager
    def _around(self, stage: str) -> Iterator[None]:
        """What every stage runs in."""
        with policy.memory_told(self.run_dir, stage), self.profiler.stage(stage):
            yield

    def steps(self) -> Iterator[int]:
        """The rollout steps that are left: up to train.steps, or until train.sampled_tokens have been sampled."""
        self.stop.begin()
        watchdog.reach("step")
        step = self.first_step
        owed = self.state.pop("row", None) is not None
        if owed or (step == 0 and self.config.evaluation.interval and self.validation):
            self._finish_row(step, validate=True)
        while not self._is_last(step):
            self._stop_if_asked()
            step += 1
            with self.profiler.step(step):
                yield step

    def _stop_if_asked(self) -> None:
        """Between two steps, and within a step as long as no weight has changed."""
        if self.stop.agreed():
            raise Stopped("stopped on request")

    def _is_last(self, step: int) -> bool:
        budget = self.config.train.sampled_tokens
        return step >= self.config.train.steps or (budget is not None and self.tokens >= budget)

    def sample(self, step: int) -> list[Group]:
        """One rollout step: this rank's groups to train on. Its statistics go to the log, its answers to rollouts/."""
        result = self.sampler.groups(step)
        for warning in result.warnings:
            self.log.note(f"step {step}: {warning}")
        self.log.count_as("rewards", result.reward_seconds)
        self.log.own("generate", result.own_seconds)
        tokens = result.statistics["sampled_tokens"]
        self.tokens += tokens
        self.log.add({f"train/{name}": value for name, value in result.statistics.items()} | result.engines, tokens=tokens)
        if self.config.rollout.save and self.engine.is_first:
            path = rollout.rollout_path(self.run_dir, step, self.engine.index, self.engine.count)
            rollout.write_rollouts(path, step, result.groups)
        return result.groups

    def batch(self, groups: list[Group]) -> list[list[Batch]]:
        """This rank's micro-batches of every mini-batch of the rollout step."""
        config, settings = self.config, self.config.objective
        answers, numbers = exchange.table(groups)
        layout = self.policy.layout(config.train.prompts_per_update)
        weights = partial(objectives.weights, settings=settings)
        plan = batching.plan(answers, layout, weights, settings.reduction, settings.reduction_constant, settings.ratio != "token")
        watched = config.logging.coefficient_answers if config.rollout.save else 0
        self.watch = policy.Watch(answers, watched, seed=f"{config.seed}/{self.state['step']}")
        if plan.mini_batches:
            self.log.add({"train/fill": sum(m.fill for m in plan.mini_batches) / len(plan.mini_batches)})
        return self.policy.receive(groups, numbers, plan)

    def set_old_logprobs(self, mini_batches: list[list[Batch]]) -> list[dict[str, float]]:
        """pi_old: a Megatron forward pass, or the sampler's own numbers. Returns the totals of that pass, if there was one.

        The first mini-batch needs none: there pi_theta = pi_old still, and its update makes what a pass would.
        """
        self._stop_if_asked()
        later = [batch for mini in mini_batches[1:] for batch in mini]
        if self.config.train.old_logprobs == "rollout":
            self.policy.copy_old_logprobs([batch for mini in mini_batches for batch in mini])
        elif later:
            totals = self.policy.fill_old_logprobs(later, self.config.objective)
            self.log.own("old_logprobs", self.policy.own_seconds)
            return [totals]
        return []

    def update(self, mini_batch: list[Batch], on_policy: bool) -> dict[str, float]:
        """One optimiser step; on_policy: on the weights that sampled. Returns its totals."""
        if on_policy:
            self._stop_if_asked()  # for the last time: after the first update the step is finished and saved
        totals = self.policy.update(mini_batch, self.objective, objectives.METRICS, on_policy, self.watch)
        self.log.own("train", self.policy.own_seconds)
        return totals

    def sync(self, step: int) -> None:
        """The trainer's weights for the sampler, and the check that they got there."""
        if self.sampler.sync(self.policy.hand_over(), version=step):
            measured = self.check.after_sync(step)
            if step == 0 or step > self.first_step:  # what a resumed run begins with is of a step whose row is written
                self.log.add({f"train/{name}": value for name, value in measured.items()})
        self.policy.offload()

    def _log_measured(self, totals: list[dict[str, float]]) -> None:
        """Entropy and the sampler's mismatch: of the first update's own pass, and of the forward-only pass over the others."""
        if totals:
            self.log.add({f"train/{name}": value for name, value in objectives.summarize_measured(totals).items()})

    def _write_coefficients(self, step: int) -> None:
        """R and c of the answers that were watched, beside the step's answers."""
        if self.config.rollout.save and self.config.logging.coefficient_answers:
            pushes = self.watch.collect(self.topology)
            if self.topology.is_first:
                rollout.write_coefficients(self.run_dir, step, pushes)

    def finish_step(self, step: int, updates: list[dict[str, float]], measured: list[dict[str, float]]) -> None:
        """Log, validate, save. measured: totals of the passes that made old log-probs alone."""
        config, last = self.config, self._is_last(step)
        if config.train.sampled_tokens is not None:  # as many steps as the tokens so far promise
            self.log.total_steps = step if last else min(config.train.steps, math.ceil(step * config.train.sampled_tokens / self.tokens))
        self._log_measured([*updates[:1], *measured])
        self._write_coefficients(step)
        self.log.add({f"train/{name}": value for name, value in objectives.summarize(updates, config.optimizer.clip_grad).items()})
        self._note_state(step)
        interval = config.evaluation.interval
        self._finish_row(step, validate=bool(self.validation and interval and (step % interval == 0 or last)))
        if last or (config.checkpoint.interval and step % config.checkpoint.interval == 0):
            with self.log.stage("checkpoint"):  # counts to the next row
                self._save()
                self.policy.offload()
                self.engine.wake()

    def _note_state(self, step: int) -> None:
        """What a checkpoint after `step` tells besides the model: JSON, and the answers that go on."""
        cursor, sampler = self.cursor.state_dict(), self.sampler.state_dict()
        self.state = {"command": "train", "step": step, "tokens": self.tokens, "cursor": cursor, "sampler": sampler}
        self.carried = self.sampler.carried()

    def _finish_row(self, step: int, validate: bool) -> None:
        """Validate and commit the row. Until then it is part of the state: a run stopped here makes the validation when it goes on."""
        if validate:
            self.state["row"] = dict(self.log.row)
            with self.log.stage("validate"):
                self.validated = step, evaluate.validate(self.engine, self.judge, self.validation, self.config, step)
            self.log.add(self.validated[1])
            del self.state["row"]
        self.saves.poll()
        self.log.commit(step)  # before the save: a run that is killed between the two makes the row again, and none is lost

    def _save_for_later(self) -> str:
        """Save the state after the last whole step, unless it is saved already; returns the sentence that says so. Collective."""
        step = self.state["step"]
        if step == 0:
            return "stopped on request before the first step was finished; the same command begins again"
        self.saves.finish()
        directory = saves.directory_of(self.run_dir, step)
        if not self.engine.gather((directory / checkpoint.MANIFEST).is_file())[0]:  # one view of the file system: rank 0's
            self._save()
        self.saves.end()
        return f"stopped on request after step {step}, saved; the same command goes on"

    def _save(self) -> None:
        if self.policy.returns_to_be_saved:
            self.engine.sleep(level=1)  # what left the GPU comes back to be written, and needs the room
        step, scores = self.validated
        more = partial(self.sampler.write_carried, groups=self.carried)
        self.saves.start(self.state, scores if step == self.state["step"] else None, more)

    def finish(self) -> None:
        """Export the model, write the report, print the table. Raises UserError where the last checkpoint could not be saved."""
        watchdog.reach("end")
        self.saves.end()
        if self.config.checkpoint.export:
            self.policy.export(self.run_dir / "huggingface")
        self.log.close()
        if self.topology.is_first:
            from megatron_nft import report  # imports matplotlib: only at the end

            report.write_report(self.run_dir)
            print(report.summary(self.run_dir), flush=True)

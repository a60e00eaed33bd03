"""The training loop, Algorithm 1 of arXiv 2505.18116. Every rank runs it."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from megatron_nft import batching, evaluation, objectives, policy, prompts, report, rollout
from megatron_nft.config import Config, save
from megatron_nft.errors import UserError
from megatron_nft.logbook import Logbook
from megatron_nft.policy import checkpoint, exchange
from megatron_nft.rewards import Judge


def train(config: Config) -> None:
    """Post-train config.model.path on config.data.train; everything that is written goes to config.run_dir."""
    run = Run(config)
    for step in range(run.first_step + 1, config.train.steps + 1):
        with run.log.stage("generate"):  # a^1..a^K ~ pi_old for prompts q ~ D, until enough groups have 0 < r̂ < 1
            groups = run.sample(step)
        with run.log.stage("batching"):  # w(q), the denominators, and who trains which answer
            mini_batches = run.batch(groups)
        with run.log.stage("old_logprobs"):
            run.set_old_logprobs(mini_batches)
        with run.log.stage("train"):  # L = - sum w(q) [r log R + (1 - r) log max_v((1 - r̂ R) / (1 - r̂), eps)]
            updates = [run.policy.update(batches, run.objective, objectives.METRICS) for batches in mini_batches]
        with run.log.stage("sync"):  # pi_old <- pi_theta
            run.sampler.sync(run.policy.weights(), version=step)
        run.finish_step(step, updates)
    run.close()


class Run:
    """The parts of a training run, put together and, where the run directory has a checkpoint, resumed from it."""

    def __init__(self, config: Config):
        self.config, self.run_dir = config, Path(config.run_dir)
        resume_from = find_checkpoint(config)
        self.tokenizer = prompts.load_tokenizer(config.model.path)
        self.prompts = prompts.load_prompts(config.data.train, self.tokenizer, config.data)
        self.validation = evaluation.load_sets(config.evaluation, self.tokenizer, config.data)
        self.topology = policy.initialize(config.parallel, config.seed)
        self.judge = Judge.for_config(config)
        self.policy = policy.Policy(config, self.topology)
        self.cursor = prompts.Cursor(self.prompts, config.seed, config.data.shuffle)
        self.objective = partial(objectives.OBJECTIVES[config.objective.name], settings=config.objective)
        self.first_step, self.sampled_tokens = 0, 0
        if resume_from:
            state = self.policy.load(resume_from)
            self.first_step, self.sampled_tokens = state["step"], state["sampled_tokens"]
            self.cursor.load_state_dict(state["cursor"])
        self.log = self._open_log()
        self.engine = rollout.Engine(config.model.path, config.rollout, rollout.window(config), config.model.precision, config.seed)
        self.sampler = rollout.Sampler(self.engine, self.judge, self.cursor, config)
        self.sampler.sync(self.policy.weights(), version=self.first_step)
        if self.first_step == 0:
            self._validate(0)
            self.log.commit(0)

    def _open_log(self) -> Logbook:
        first, config = self.topology.is_first, self.config
        if first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save(config, self.run_dir / "config.yaml")
        log = Logbook(config.run_dir, config.objective.name, config.train.steps, self.first_step, config.logging, asdict(config), enabled=first)
        log.note(f"{len(self.prompts)} prompts; {policy.model.kernels()}")
        if self.first_step:
            log.note(f"resumed after step {self.first_step}")
        return log

    def sample(self, step: int):
        """One rollout step: this rank's mixed groups. Its statistics go to the log."""
        result = self.sampler.groups(step)
        for warning in result.warnings:
            self.log.note(f"step {step}: {warning}")
        self.sampled_tokens += int(result.statistics["sampled_tokens"])
        self.log.add(tokens=result.statistics["sampled_tokens"])
        self.log.add({f"train/{name}": value for name, value in result.statistics.items()})
        return result.groups

    def batch(self, groups):
        """This rank's micro-batches of every mini-batch of the rollout step."""
        config = self.config
        answers, numbers = exchange.table(groups, config.rollout.n)
        layout = batching.Layout(self.topology.data_size, config.train.tokens_per_micro_batch, config.train.prompts_per_update)
        plan = batching.plan(
            answers,
            layout,
            weight=partial(objectives.prompt_weight, normalize=config.objective.normalize),
            reduction=config.objective.reduction,
            constant=config.objective.reduction_constant,
            per_sequence=config.objective.ratio == "sequence",
        )
        if plan.mini_batches:
            self.log.add({"train/fill": sum(m.fill for m in plan.mini_batches) / len(plan.mini_batches)})
        return self.policy.receive(groups, numbers, plan)

    def set_old_logprobs(self, mini_batches) -> None:
        """pi_old: a Megatron forward pass, or the sampler's own numbers."""
        batches = [batch for mini in mini_batches for batch in mini]
        if not batches:
            return
        if self.config.train.old_logprobs == "rollout":
            self.policy.copy_old_logprobs(batches)
        else:
            self.log.add({f"train/{name}": value for name, value in self.policy.fill_old_logprobs(batches).items()})

    def finish_step(self, step: int, updates: list[dict[str, float]]) -> None:
        """Log, validate, save."""
        config, last = self.config, step == self.config.train.steps
        self.log.add({f"train/{name}": value for name, value in objectives.summarize(updates, config.optimizer.clip_grad).items()})
        if config.evaluation.interval and (step % config.evaluation.interval == 0 or last):
            self._validate(step)
        if last or (config.checkpoint.interval and step % config.checkpoint.interval == 0):
            with self.log.stage("checkpoint"):
                self._save(step)
        self.log.commit(step)

    def _validate(self, step: int) -> None:
        with self.log.stage("validate"):
            if self.validation:
                self.log.add(evaluation.validate(self.engine, self.judge, self.validation, self.config, step))

    def _save(self, step: int) -> None:
        state = {"step": step, "sampled_tokens": self.sampled_tokens, "cursor": self.cursor.state_dict()}
        self.policy.save(self.run_dir / "checkpoints" / f"step_{step}", state)
        if self.topology.is_first:
            checkpoint.prune(self.run_dir, self.config.checkpoint.keep)

    def close(self) -> None:
        """Export the model, write the report, print the table, and let go of everything."""
        if self.config.checkpoint.export:
            self.policy.export(self.run_dir / "huggingface")
        self.log.close()
        self.judge.close()
        self.engine.close()
        if self.topology.is_first:
            report.write_report(self.run_dir)
            print(report.summary(self.run_dir), flush=True)
        policy.shutdown()


def find_checkpoint(config: Config) -> Path | None:
    """Where to continue from. Raises UserError for a run directory that is in use while `resume` is off."""
    run_dir = Path(config.run_dir)
    if config.resume:
        return checkpoint.newest(run_dir)
    if (run_dir / "metrics.jsonl").exists():
        raise UserError(f"run_dir {run_dir} already holds a run", "choose another run_dir, or set resume=true to continue it")
    return None

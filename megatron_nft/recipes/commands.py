"""The recipes as commands of NeMo-Run's: `nemorun megatron_nft nft_32b run.executor=slurm train.steps=10 --dryrun`."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import nemo_run as run
from nemo_run.cli import cli_parser

from megatron_nft.config import known_keys
from megatron_nft.errors import UserError
from megatron_nft.recipes import executors
from megatron_nft.recipes.scripts import RECIPES

SECTIONS = {key.partition(".")[0] for key in known_keys()}


@dataclass(kw_only=True)
class Context(run.cli.RunContext):
    """NeMo-Run's context of a command. Words that are settings of the run (train.steps=10) are kept for it; the others are NeMo-Run's."""

    settings: list[str] = field(default_factory=list)

    def cli_execute(self, fn: Callable, args: list[str], entrypoint_type: str = "experiment") -> None:
        """Run the command. A mistake of the user's is one line and exit code 2."""
        self.settings = [word for word in args if _is_setting(word)]
        args = [word for word in args if not _is_setting(word)]
        if not any(word.startswith("run.executor=") for word in args):  # a default of NeMo-Run's own kind takes no run.executor.nodes=...
            args.insert(0, f"run.executor={fn.executor}")
        logging.getLogger(cli_parser.__name__).disabled = True  # it says what is wrong besides raising it
        try:
            super().cli_execute(fn, args, entrypoint_type)
        except (UserError, cli_parser.CLIException, ValueError) as error:
            told = error if isinstance(error, UserError) else _mistake(str(error), args)
            if told is None:
                raise
            print(f"megatron-nft: {' '.join(str(told).split())}", file=sys.stderr)
            sys.exit(2)

    def launch(self, experiment: run.Experiment, sequential: bool = False) -> None:
        """Start it; or print what would be submitted, and what each task would run, in lines as they are: NeMo-Run breaks them to fit."""
        if not self.dryrun:
            return super().launch(experiment, sequential)
        experiment.dryrun(log=False)
        for job in experiment.jobs:
            print(f"{job._dryrun_info}\n\n#----------------\n# {job.id}.sh, which each task runs\n#----------------\n{job.task.inline}")

    def _should_continue(self, skip_confirmation: bool) -> bool:
        return self.dryrun or super()._should_continue(skip_confirmation)  # NeMo-Run asks before a dry run, too


def _is_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and key.split(".")[0] in SECTIONS


def _mistake(said: str, words: list[str]) -> UserError | None:
    """What NeMo-Run's parser says of a word, in a line; None where it says nothing of any."""
    for word in words:
        key, _, value = word.partition("=")
        if word.removeprefix("run.executor.") in said or (key == "run.executor" and f"Executor {value} not found" in said):
            return UserError(f"{word} is not understood", "a setting is section.name=value; --help lists NeMo-Run's words and executors")
    return None


def _command(recipe: Callable[..., run.Script], default: str) -> Callable:
    """The command of a recipe; `default`: the executor where none is named."""

    def command(ctx: Context, config: str = "", checkout: str = "") -> None:
        script = recipe(ctx.settings, config, checkout)
        executor = executors.fit(ctx.executor, script)
        with run.Experiment(ctx.name) as experiment:
            experiment.add(script, executor=executor, name=recipe.__name__, tail_logs=ctx.tail_logs)
            ctx.launch(experiment)

    command.__name__ = command.__qualname__ = recipe.__name__
    command.__doc__, command.executor = recipe.__doc__, default
    return run.cli.entrypoint(command, namespace="megatron_nft", type="experiment", run_ctx_cls=Context)


COMMANDS = tuple(_command(recipe, "local" if recipe.__name__ == "nft_tiny" else "slurm") for recipe in RECIPES)

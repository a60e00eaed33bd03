"""The command line. Exit codes: 0 done; 2 what the user gave is wrong (one line on stderr); 75 stopped on request, the same command
goes on; 70 ended by the watchdog; 130 interrupted by Ctrl-C; anything else is a fault of ours."""

import argparse
import errno
import os
import shlex
import sys
from pathlib import Path

from megatron_nft import config
from megatron_nft.errors import UserError
from megatron_nft.stopping import EXIT_CODE, Stopped, StopRequest
from megatron_nft.watchdog import Watchdog

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments, more = parser().parse_known_args(argv)
    if any(word.startswith("-") for word in more) or (more and not hasattr(arguments, "overrides")):
        parser().error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # overrides after --dry-run
        arguments.overrides += more
    _quiet_libraries()
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"megatron-nft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks stopped at the same step
            print(f"megatron-nft: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"megatron-nft: {error.strerror}{where}: make room; the same command goes on from what is saved", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"megatron-nft: interrupted{getattr(arguments, 'goes_on', '')}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = argparse.ArgumentParser(prog="megatron-nft", description="NFT post-training on Megatron-Core and vLLM.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", _train, "post-train a model on checkable problems"),
        ("evaluate", _evaluate, "score a model (Hugging Face directory, run or checkpoint) on the sets of evaluation.sets"),
        ("sft", _sft, "supervised warm start"),
        ("serve", _serve, "one vLLM server for training with rollout.mode=served"),
        ("preflight", _preflight, "what a run's nodes, files and network are like, before a model is loaded; on all ranks, as train"),
        ("contamination", _contamination, "problems of the benchmarks that are in the training data"),
        ("plan", _plan, "what a training needs and how long it takes on config.plan's cluster, before it runs: an estimate"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", metavar="CONFIG.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. train.steps=10")
        command.set_defaults(run=run)
        if name in ("train", "sft"):
            command.set_defaults(goes_on="; the same command goes on from the newest checkpoint")
        if name == "evaluate":
            text = "judge the saved answers of an evaluation again, without a model"
            command.add_argument("--rejudge", metavar="NAME", nargs="?", const="", help=text)
        if name == "train":
            text = "print the settings and where they come from, check all that needs no model in memory, and stop"
            command.add_argument("--dry-run", action="store_true", help=text)
        if name == "preflight":
            _preflight_arguments(command)
        if name == "plan":
            _plan_arguments(command)
        if name == "contamination":
            _contamination_arguments(command)
    convert = commands.add_parser("convert", help="Hugging Face <-> Megatron checkpoints")
    kinds = convert.add_subparsers(required=True, metavar="KIND")
    for name, source in (("hf-to-megatron", "HF_DIR"), ("megatron-to-hf", "CHECKPOINT_DIR"), ("verify", "HF_DIR")):
        kind = kinds.add_parser(name)
        kind.add_argument("source", metavar=source, type=Path)
        if name != "verify":
            kind.add_argument("output", metavar="OUT_DIR", type=Path)
            kind.set_defaults(goes_on="; the same command goes on after the files that are finished")
        kind.set_defaults(run=_convert, kind=name)
        if name == "megatron-to-hf":
            text = "config.json and tokenizer of the model, for a checkpoint that Megatron-LM saved"
            kind.add_argument("--hf-config", metavar="HF_DIR", type=Path, help=text)
        if name == "verify":
            kind.add_argument("--no-logits", action="store_true", help="compare the tensors only, which needs little memory")
    report = commands.add_parser("report", help="write RUN_DIR/report.html and print the summary")
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    report.set_defaults(run=_report)
    compare = commands.add_parser("compare", help="two evaluations side by side, problem by problem")
    for which in ("a", "b"):
        compare.add_argument(which, metavar=which.upper(), type=Path, help="a JSON file of evaluations/, or a run directory")
    compare.add_argument("--name", help="of the evaluation, where a run directory has several")
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all of it, as JSON")
    form.add_argument("--markdown", action="store_true", help="the tables as markdown")
    compare.set_defaults(run=_compare)
    return top


def _preflight_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs that each node must show; default: 0")
    command.add_argument("--trainers", type=int, metavar="N", help="ranks that will train, beside servers; default: all")
    text = "let a run that is resumed have other settings than it began with"
    command.add_argument("--changed", action="store_true", help=text)


def _contamination_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--words", type=int, default=13, metavar="N", help="a run of so many words in common touches a problem")
    text = "for --ids: the least share of a problem's runs that a training question has"
    command.add_argument("--share", type=float, default=0.5, metavar="S", help=text)
    command.add_argument("--output", type=Path, metavar="FILE", help="all pairs as JSON; default: run_dir/contamination.json")
    command.add_argument("--ids", type=Path, metavar="FILE", help="write the training prompts to leave out with data.exclude")


def _plan_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--search", action="store_true", help="layouts that do better, with the reasons")
    command.add_argument("--top", type=int, default=5, metavar="N", help="of --search: how many")
    text = "overrides of another candidate, quoted as in a shell, to be put beside; may be given several times"
    command.add_argument("--with", dest="others", action="append", default=[], metavar="'key=value ...'", help=text)
    command.add_argument("--rehearse", action="store_true", help="drive the control path of a step with all ranks, without weights")
    command.add_argument("--against", type=Path, metavar="RUN_DIR", help="beside it what a run measured, and every error in percent")
    command.add_argument("--any-device", action="store_true", help="of --against: though the run was not on plan.gpu")
    command.add_argument("--json", action="store_true", help="all numbers as JSON; bytes and seconds")
    command.add_argument("--output", type=Path, metavar="DIR", help="write plan.json, plan.png and plan.html there")


def _train(arguments: argparse.Namespace) -> None:
    settings, sources = config.load_with_sources(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(config.describe(settings, sources), flush=True)
        from megatron_nft import trainer

        trainer.dry_run(settings)
        from megatron_nft.planner import command as planner

        print(planner.short(settings), flush=True)
        return
    with StopRequest(settings.checkpoint.grace_time) as stop, _watchdog(settings):  # before the slow imports: no signal is missed
        from megatron_nft import trainer

        trainer.train(settings, stop)


def _evaluate(arguments: argparse.Namespace) -> None:
    name = arguments.rejudge
    if name and "=" in name:  # a setting after a bare --rejudge
        arguments.overrides, name = [*arguments.overrides, name], ""
    settings = config.load(arguments.config, arguments.overrides)
    if name is not None:
        from megatron_nft.evaluation.rejudge import rejudge

        print(rejudge(settings, name or None), flush=True)
        return
    arguments.goes_on = f"; {goes_on(settings.resume)}"
    with StopRequest(settings.checkpoint.grace_time, goes_on(settings.resume)) as stop:
        _evaluate_model(settings, stop)


def goes_on(resume: bool) -> str:
    """What is said of an evaluation that is stopped: one that begins anew each time would never end."""
    return f"{'' if resume else 'with resume=true '}the same command goes on after the problems that are answered"


def _evaluate_model(settings: config.Config, stop: StopRequest) -> None:
    from megatron_nft import fitting, policy
    from megatron_nft.evaluation.command import evaluate_model
    from megatron_nft.evaluation.source import opened

    settings.parallel = config.ParallelConfig()  # of the trainer, which evaluation does without
    with opened(settings) as source:
        policy.check(settings, config.max_model_len(settings), training=False)
        fitting.check_engine(settings, config.max_answer_length(settings))
        policy.start_distributed()
        try:
            evaluate_model(settings, source, policy.precision_of(settings.model.precision), stop)
        finally:
            policy.shutdown()


def _compare(arguments: argparse.Namespace) -> None:
    from megatron_nft.evaluation.compare import compare

    found = compare(arguments.a, arguments.b, arguments.name)
    print(found.as_json() if arguments.json else found.markdown() if arguments.markdown else found.plain())


def _serve(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides)
    from megatron_nft import fitting, policy
    from megatron_nft.rollout.serving import serve

    policy.check_machine()
    fitting.check_engine(settings, config.max_model_len(settings))
    serve(settings, policy.precision_of(settings.model.precision))


def _preflight(arguments: argparse.Namespace) -> None:
    from megatron_nft.preflight import preflight

    preflight(arguments.config, arguments.overrides, arguments.gpus_per_node, arguments.trainers, arguments.changed)


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_nft.planner.command import Asked, against, run

    if arguments.against:
        if arguments.search or arguments.others or arguments.rehearse or arguments.output:
            raise UserError("--against has other things beside it than --json and --any-device", "ask for them by themselves")
        settings = config.load(arguments.config, arguments.overrides)
        return against(settings, arguments.against, arguments.any_device, arguments.json)
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}", "use 1 or more")
    path, overrides = arguments.config, arguments.overrides
    others = {given: config.load(path, [*overrides, *_words(given)]) for given in arguments.others}
    asked = Asked(others, arguments.top if arguments.search else 0, arguments.json, arguments.output)
    settings = config.load(path, overrides)
    run(settings, asked, rehearse=_rehearsal if arguments.rehearse else None)


def _words(given: str) -> list[str]:
    """The overrides of --with, as a shell would cut them."""
    try:
        return shlex.split(given)
    except ValueError as error:
        raise UserError(f"--with {given!r} has a quotation mark too few", "close it, e.g. --with \"model.path='a b'\"") from error


def _rehearsal(plan):
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # nothing of it is on a GPU
    from megatron_nft.rehearsal import rehearse

    return rehearse(plan)


def _contamination(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides)
    from megatron_nft.prompts import contamination

    contamination.report(settings, arguments.words, arguments.share, arguments.output, arguments.ids)


def _sft(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides)
    with StopRequest(settings.checkpoint.grace_time) as stop, _watchdog(settings):
        from megatron_nft.supervised import sft

        sft(settings, stop)


def _watchdog(settings: config.Config) -> Watchdog:
    rank = int(os.environ.get("RANK", "0"))
    return Watchdog(settings.train.watchdog_timeout, rank, settings.run_dir, settings.train.watchdog_phases)


def _convert(arguments: argparse.Namespace) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # all of it is reading, writing and a comparison on the CPU
    from megatron_nft import convert, verify

    try:
        _convert_kind(arguments, convert, verify)
    except OSError as error:  # a path the user gave, or a file in it, that the system refuses
        if error.filename is None:
            raise
        mend = "see that it is there and that you may use it, or name another"
        raise UserError(f"{error.filename} cannot be read or written ({error.strerror})", mend) from error


def _convert_kind(arguments: argparse.Namespace, convert, verify) -> None:
    if arguments.kind == "verify":
        verify.verify(arguments.source, logits=not arguments.no_logits)
    elif arguments.kind == "hf-to-megatron":
        convert.hf_to_megatron(arguments.source, arguments.output)
    else:
        convert.megatron_to_hf(arguments.source, arguments.output, arguments.hf_config)


def _report(arguments: argparse.Namespace) -> None:
    from megatron_nft import report

    path = report.write_report(arguments.run_dir)
    print(report.summary(arguments.run_dir))
    print(path)


def _quiet_libraries() -> None:
    """Libraries' own chatter off, unless the user's environment asks for it."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)

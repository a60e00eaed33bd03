"""`megatron-nft plan`, and what `train --dry-run` says of it. What can be refused is refused before torch is imported."""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.planner.places import check

if TYPE_CHECKING:
    from megatron_nft.planner.plan import Plan


class Rehearsed(Protocol):
    """What came of a rehearsal, which lives above this room."""

    def as_dict(self) -> dict: ...

    def text(self) -> str: ...


@dataclass
class Asked:
    """What is asked for besides the plan itself."""

    others: dict[str, Config] = field(default_factory=dict)  # candidates to be put beside it, by their overrides
    layouts: int = 0  # of a search; 0: none
    as_json: bool = False
    output: Path | None = None


def run(config: Config, asked: Asked, rehearse: "Callable[[Plan], Rehearsed] | None" = None) -> None:
    """Print the plan and what else is asked for. Raises UserError, after that, where the config does not fit."""
    for one in (config, *asked.others.values()):
        check(one)
    if asked.output:
        _check_output(asked.output)
    from megatron_nft.planner import picture, search
    from megatron_nft.planner.plan import plan

    bar = sys.stderr.isatty()
    found = plan(config)
    others = {name: plan(one) for name, one in asked.others.items()}
    layouts = search.search(found, asked.layouts, bar) if asked.layouts else None
    rehearsed = rehearse(found) if rehearse else None
    print(_json(found, others, layouts, rehearsed) if asked.as_json else _text(found, others, layouts, rehearsed), flush=True)
    if asked.output:
        files = picture.write(found, asked.output)
        if not asked.as_json:
            print(f"written: {', '.join(map(str, files))}", flush=True)
    if not found.fits:
        raise UserError(f"the config does not fit (estimate): {found.reasons[0]}", search.mend(found, bar))


def against(config: Config, run_dir: Path, any_device: bool, as_json: bool) -> None:
    """Print a plan beside what a run measured."""
    from megatron_nft.planner.against import compare

    found = compare(config, run_dir, any_device)
    print(json.dumps(found.as_dict(), indent=2) if as_json else found.text(), flush=True)


def _check_output(directory: Path) -> None:
    """Make it, before the work. Raises UserError where it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--output {directory} cannot be written to ({error.strerror})", "name another directory") from error


def short(config: Config) -> str:
    """A plan in a few lines, or the line that says how to get one."""
    if config.plan.nodes is None:
        return "no plan: plan.nodes=N (and plan.gpu, plan.gpus_per_node) gives an estimate of memory and time; see megatron-nft plan"
    from megatron_nft.planner import tables
    from megatron_nft.planner.plan import plan

    return tables.short(plan(config))


def _text(found: "Plan", others: "dict[str, Plan]", layouts, rehearsed: Rehearsed | None) -> str:
    from megatron_nft.planner import search, tables

    parts = [tables.text(found)]
    if others:
        parts.append(tables.comparison({"given": found} | {f"({n})": one for n, one in enumerate(others.values(), 1)}))
        parts.append("\n".join(f"({n}) {name}" for n, name in enumerate(others, 1)))
    if layouts is not None:
        parts.append(search.table(found, layouts) if layouts else "no layout was found that fits")
    if rehearsed is not None:
        parts.append(rehearsed.text())
    return "\n\n".join(parts)


def _json(found: "Plan", others: "dict[str, Plan]", layouts, rehearsed: Rehearsed | None) -> str:
    content = found.as_dict()
    if others:
        content["others"] = {name: one.as_dict() for name, one in others.items()}
    if layouts is not None:
        content["layouts"] = [{"overrides": one.overrides, "why": one.why, **one.plan.as_dict()} for one in layouts]
    if rehearsed is not None:
        content["rehearsal"] = rehearsed.as_dict()
    return json.dumps(content, indent=2)

"""From the name of a verdict function to the function, and from its result to a Verdict."""

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType

from megatron_nft.errors import UserError
from megatron_nft.trajectories import OUTCOMES, Verdict

BUILT_IN = {
    "strict_box": "megatron_nft.rewards.boxed:strict_box",
    "dapo": "megatron_nft.rewards.answer_line:dapo",
    "math_verify": "megatron_nft.rewards.symbolic:math_verify",
}
_MEND = f"use {', '.join(BUILT_IN)}, package.module:function or path/to/file.py:function"

VerdictFunction = Callable[..., Verdict | float | Awaitable[Verdict | float]]


@dataclass(frozen=True)
class Kind:
    """How a verdict function is called."""

    is_async: bool  # `async def`: many calls at a time
    takes_prompt: bool  # it has a parameter named prompt, which gets {id, question, source}


def resolve(name: str) -> VerdictFunction:
    """The function of that name: built in, `package.module:function`, or `path/to/file.py:function`.

    Raises UserError when it cannot be found or loaded, or cannot be called with (response, answer) and, if it names one, a prompt.
    """
    return load_function(BUILT_IN.get(name, name), f"verdict function {name!r}", ("response", "answer"), _MEND, optional="prompt")


def kind_of(function: VerdictFunction) -> Kind:
    """By its signature. A third parameter of any other name is the function's own affair: it keeps its default."""
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004 - the method itself is wanted
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
    return Kind(is_async, _takes(function, "prompt"))


def _takes(function: Callable, name: str) -> bool:
    parameter = inspect.signature(function).parameters.get(name)
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def best(verdicts: list[Verdict]) -> Verdict:
    """Of the verdicts against several golds: the first of those with the highest score."""
    return reduce(lambda one, other: other if other.score > one.score else one, verdicts)


def load_function(name: str, what: str, arguments: tuple[str, ...], mend: str, optional: str | None = None) -> Callable:
    """The user's function `package.module:function` or `path/to/file.py:function`, which takes `arguments` by position.

    what: the function in a few words, for messages. optional: one that is passed by name to a function that names it.
    Raises UserError when the function cannot be found or loaded, or called with its arguments.
    """
    where, colon, attribute = name.rpartition(":")
    if not (where and colon and attribute):
        raise UserError(f"there is no {what}", mend)
    module = _load(where, what, mend)
    function = getattr(module, attribute, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UserError(f"{what}: {where} has no function {attribute}", f"use one of {', '.join(found)}" if found else "define it there")
    try:
        named = {optional: None} if optional and _takes(function, optional) else {}
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise UserError(f"{what} cannot be called with ({', '.join(arguments)}) ({error})", f"let it take these {len(arguments)}") from None
    return function


def code_of(name: str) -> str | None:
    """A hash of the file that holds the function of that name, where it is a user's; None where it is none, or the file is not found."""
    where, colon, _ = name.rpartition(":")
    if not colon:
        return None
    try:
        file = where if where.endswith(".py") else importlib.util.find_spec(where).origin
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (ImportError, AttributeError, TypeError, ValueError, OSError):  # told by `resolve` where the function is wanted
        return None


def _load(where: str, what: str, mend: str) -> ModuleType:
    """The module at a path or of a dotted name. Whatever a user's module raises while it loads becomes a UserError."""
    if where.endswith(".py") and not Path(where).is_file():
        raise UserError(f"{what}: no file at {where} (in {Path.cwd()})", "mend the path")
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises
        raise UserError(f"{what}: cannot import {where} ({type(error).__name__}: {error})", mend) from None


def as_verdict(result: Verdict | float, name: str) -> Verdict:
    """What a verdict function gave, as a Verdict; a plain number counts as "right" from 0.5.

    Raises UserError for anything but a Verdict or a number in [0, 1].
    """
    verdict = result
    if not isinstance(result, Verdict):
        if isinstance(result, str) or not hasattr(result, "__float__"):
            raise _out_of_range(result, name)
        try:
            score = float(result)
        except (TypeError, ValueError):  # an array of several numbers
            raise _out_of_range(result, name) from None
        verdict = Verdict(score, "right" if score >= 0.5 else "wrong")
    if not (0.0 <= verdict.score <= 1.0 and verdict.outcome in OUTCOMES and isinstance(verdict.found, str | None)):
        raise _out_of_range(result, name)
    return verdict


def _out_of_range(result: object, name: str) -> UserError:
    return UserError(f"verdict function {name!r} returned {str(result)[:80]!r} ({type(result).__name__})",
                     "let it return a number from 0 to 1, or a Verdict (score from 0 to 1, outcome, found: a text or None)")  # fmt: skip

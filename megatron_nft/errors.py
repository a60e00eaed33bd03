"""UserError: what the user gave is wrong. The command line prints it as one line and exits with code 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class UserError(Exception):
    """One sentence that says what is wrong, where, and how to mend it.

    >>> str(UserError("heads (14) cannot be divided by tensor_model_parallel_size (4)", "use 1, 2, 7 or 14"))
    'heads (14) cannot be divided by tensor_model_parallel_size (4): use 1, 2, 7 or 14'
    """

    def __init__(self, problem: str, mend: str):
        super().__init__(f"{problem}: {mend}")
        self.problem, self.mend = problem, mend


_wanting: ContextVar[list[str] | None] = ContextVar("wanting", default=None)


def needs_gpu(problem: str, mend: str) -> None:
    """Raise UserError for a setting that a machine without a GPU cannot have; where a run is only looked at, note the problem."""
    if (noted := _wanting.get()) is None:
        raise UserError(problem, mend)
    noted.append(problem)


@contextmanager
def gpus_elsewhere() -> Iterator[list[str]]:
    """The run is for another machine, which has GPUs: what `needs_gpu` would refuse is in the list."""
    noted: list[str] = []
    token = _wanting.set(noted)
    try:
        yield noted
    finally:
        _wanting.reset(token)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def os_error_behind(error: BaseException | None) -> OSError | None:
    """The operating system's error that an error comes from: torch's writers hide it behind one of their own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error

"""megatron-nft with a signal at a chosen moment: `at_stage.py '{"stage": ..., "step": ..., "after": ..., "signal": ...}' ARGUMENTS`.

The signal falls `after` seconds after the beginning of a stage of a step ("written": after the end of its checkpoint stage, which is
before the files are complete where saving goes on in the background). SIGKILL goes to every process of the run, as when a machine goes
down; any other signal to this process, on the ranks named by "ranks" (all by default), as often as "times" says. "HANG" is no signal:
there the process makes no progress any more.

Of an evaluation: `'{"problems": 20, "signal": ...}'`, when so many problems are answered.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

import psutil

from megatron_nft.cli import main
from megatron_nft.logbook import Logbook


def strike(number: int, after: float, times: int) -> None:
    time.sleep(after)
    if number == signal.SIGKILL:
        me = psutil.Process()
        root = me.parent() if "TORCHELASTIC_RUN_ID" in os.environ else me
        for process in [*root.children(recursive=True), root]:
            if process != me:
                process.kill()
        me.kill()
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.05)


def hang_here() -> None:
    threading.Event().wait()


def watch(stage: str, step: int, after: float, signal: str, ranks: list[int] | None = None, times: int = 1) -> None:
    """Patch the log, which knows the stages."""
    rank = int(os.environ.get("RANK", "0"))
    if rank not in (ranks or ([0] if signal == "SIGKILL" else [rank])):
        return
    committed: list[int] = []
    original, commit = Logbook.stage, Logbook.commit

    def note_commit(log: Logbook, number: int):
        committed.append(number)
        return commit(log, number)

    @contextmanager
    def note_stage(log: Logbook, name: str):
        done = committed[-1] if committed else log.first_step
        now = done if name == "checkpoint" else done + 1
        if (name, now) == (stage, step) and signal != "HANG":
            begin()
        with original(log, name):
            if (name, now, signal) == (stage, step, "HANG"):
                hang_here()
            yield
        if (name, now) == ("checkpoint", step) and stage == "written":
            begin()

    def begin() -> None:
        threading.Thread(target=strike, args=(getattr(globals()["signal"], signal), after, times), daemon=True).start()

    Logbook.stage, Logbook.commit = note_stage, note_commit


def watch_answers(problems: int, signal: str) -> None:
    """Patch what keeps an evaluation's answers."""
    from megatron_nft.evaluation.answers import Answers

    add, taken = Answers.add, []

    def take(answers: Answers, *more) -> None:
        add(answers, *more)
        taken.append(more)
        if len(taken) == problems:
            strike(getattr(globals()["signal"], signal), 0.0, 1)

    Answers.add = take


if __name__ == "__main__":
    at = json.loads(sys.argv[1])
    (watch_answers if "problems" in at else watch)(**at)
    sys.exit(main(sys.argv[2:]))

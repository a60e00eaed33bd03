"""The served sampler: answers are written while the trainer trains, at most rollout.max_staleness weight updates ahead.

On rank 0 a thread keeps the servers filled from the queue, has the answers judged as they finish, and sends what is lost again. From a
sync to the next rollout step nothing new is sent, so that a checkpoint has one moment of the queue and of the cursor.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.rollout.queue import Open, Queue, Taken, has_verdict
from megatron_nft.rollout.record import read_carried, write_carried
from megatron_nft.rollout.sampler import Rollout
from megatron_nft.rollout.served import PERIOD, ServedEngine
from megatron_nft.rollout.summaries import statistics, summarise
from megatron_nft.rollout.verdicts import Verdicts
from megatron_nft.trajectories import Group, Prompt, Response
from megatron_nft.weights import Bucket

if TYPE_CHECKING:
    from megatron_nft.prompts import Cursor
    from megatron_nft.rewards.judge import Judge

TICK = 0.05  # seconds between two looks at verdicts
MOST_LOSSES = 5  # of a group: then it is given up, since it may be what its servers die of


class ServedSampler:
    """The servers, the judge of the answers, and the queue; on all ranks but the first none of these, and every method is collective."""

    def __init__(self, engine: ServedEngine, judge: "Judge", cursor: "Cursor", config: Config):
        self._engine, self._cursor, self._rollout = engine, cursor, config.rollout
        self._groups: list[Group] = []
        if engine.is_first:
            self._driver = Driver(engine, judge, cursor, config)

    def groups(self, step: int) -> Rollout:
        """As Sampler.groups; the groups are on the first rank."""
        if self._engine.is_first:
            self._driver.begin(step, self._engine.weight_version)
        self._engine.until(lambda: self._driver.enough(PERIOD))
        numbers, seconds, warnings = self._engine.of_first(self._end)
        groups, self._groups = self._groups, []
        return Rollout(groups, numbers, seconds, warnings)

    def sync(self, buckets: Iterator[Bucket], version: int) -> bool:
        """New weights for all servers; false where the run is to stop and there is none. Until the next step begins nothing new is sent."""
        if self._engine.is_first:
            self._driver.hold()
        return self._engine.sync(buckets, version)

    def close(self) -> None:
        """End the thread and give up what runs."""
        if self._engine.is_first:
            self._driver.close()

    def _end(self) -> tuple[dict[str, float], float, list[str]]:
        self._groups, numbers, seconds, warnings = self._driver.end(self._engine.weight_version)
        return numbers, seconds, warnings

    # ---- for checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint keeps besides the cursor: plain values, fit for JSON; {} on all ranks but the first, which writes them."""
        return self._driver.state_dict() if self._engine.is_first else {}

    def carried(self) -> list[Group]:
        """Groups that go on in the next step, as they were when state_dict() was called, unfinished answers among them."""
        return self._driver.carried if self._engine.is_first else []

    def write_carried(self, directory: Path, groups: list[Group]) -> list[Path]:
        """Write what `carried` gave into a checkpoint; the files."""
        return write_carried(directory, groups)

    def load(self, state: dict, directory: Path) -> None:
        """Go on where the checkpoint in `directory` was taken."""
        if self._engine.is_first:
            self._driver.load(state, read_carried(directory))


class Driver:
    """The queue and the thread that drives it, on the first rank."""

    def __init__(self, engine: ServedEngine, judge: "Judge", cursor: "Cursor", config: Config):
        self._fleet, self._decode, self._cursor, self._rollout = engine.fleet, engine.decode, cursor, config.rollout
        self._queue = Queue(cursor, config)
        self._verdicts = Verdicts(judge, steady=False)
        self._lock = threading.Lock()  # of all that the thread and the trainer both touch
        self._prompts: dict[int, Prompt] = {}  # by key, of what runs
        # by key and sample: what there is of lost answers, until all others of their groups have ended, too
        self._partial: dict[int, dict[int, Response]] = {}
        self._losses: Counter = Counter()  # by key
        self._held, self._ending, self._error = True, False, None
        self._tokens = self._lost = self._started = self._skipped = 0
        self.carried: list[Group] = []
        self._ready = threading.Event()  # the step may be over
        self._thread = threading.Thread(target=self._run, name="served sampler", daemon=True)
        self._thread.start()

    # ---- the trainer's side

    def begin(self, step: int, version: int) -> None:
        """A step begins; what has become too old is given up."""
        with self._lock:
            self._started += self._queue.started  # since the end of the step before
            self._fleet.abort(self._queue.begin(step, version))
            self._held = False
            self._ready.clear()
        self._fleet.inbox.changed.set()

    def hold(self) -> None:
        """Send nothing until a step begins. What runs goes on."""
        with self._lock:
            self._held = True

    def enough(self, seconds: float) -> bool:
        """Whether the step can end; waits so long at most."""
        self._ready.wait(seconds)
        if self._error is not None:
            raise self._error
        return self._ready.is_set()

    def end(self, version: int) -> tuple[list[Group], dict[str, float], float, list[str]]:
        """Take the step's groups: with the statistics, the seconds waited for verdicts, and warnings."""
        with self._lock:
            enough, sent = self._queue.enough, self._queue.started + self._started
            taken = self._queue.take()
            self._held = not self._rollout.max_staleness  # what is sent from here on is a step older where it is trained on
            self._give_up_the_rest()
            numbers = self._statistics(taken, version) | {"prompts_sent": sent, "prompts_skipped": self._cursor.skipped - self._skipped}
            self._started, self._skipped, self._lost, self._tokens = -self._queue.started, self._cursor.skipped, 0, 0
            seconds, self._verdicts.seconds = self._verdicts.seconds, 0.0
        warnings = [] if enough else [f"only {len(taken.kept)} of {self._rollout.prompts_per_step} groups after {sent} prompts"]
        return [group.group() for group in taken.kept], numbers | self._fleet.statistics(), seconds, warnings

    def state_dict(self) -> dict:
        """The queue's state, and `carried` with it. Answers that run are carried as far as they are, where all of a group have begun and
        they may be resumed; the others are sent again, with their prompts."""
        with self._lock:
            so_far = self._fleet.so_far()
            state, self.carried = self._queue.state_dict(), []
            for group in self._queue.carried():
                known = [self._known(group, sample, so_far.get((group.key, sample))) for sample in range(len(group.responses))]
                if group.is_complete or (self._queue.resumes and all(_has_begun(group, response) for response in known)):
                    self.carried.append(Group(group.prompt, known, group.key))
                else:
                    state["again"].append(group.prompt.id)
            kept = {str(group.position) for group in self.carried}
            state["groups"] = {key: about for key, about in state["groups"].items() if key in kept}
        return state

    def load(self, state: dict, groups: list[Group]) -> None:
        """Go on where state_dict() was taken."""
        with self._lock:
            self._queue.load(state, [(g.position, g.prompt.id, None, self._queue.fitting(g.responses)) for g in groups])

    def close(self) -> None:
        """End the thread."""
        self._ending = True
        self._fleet.inbox.changed.set()
        self._thread.join()

    def _give_up_the_rest(self) -> None:
        """What runs without a group to belong to; without max_staleness all that runs, too: it would be too old in the next step."""
        if not self._rollout.max_staleness:
            for group in self._queue.running():
                self._queue.pause(group.key, False, {})
            self._verdicts.forget()
        open_keys = self._queue.keys
        self._fleet.abort(set(self._prompts) - open_keys)
        if not self._rollout.max_staleness:  # a key may come again, for another prompt
            self._fleet.poll(), self._fleet.lost()
        self._prompts = {key: prompt for key, prompt in self._prompts.items() if key in open_keys}
        self._partial = {key: some for key, some in self._partial.items() if key in open_keys}
        self._losses = Counter({key: count for key, count in self._losses.items() if key in open_keys})

    def _statistics(self, taken: Taken, version: int) -> dict[str, float]:
        summaries = [summarise(group.group(), group.responses, version) for group in taken.decided]
        return (
            statistics(summaries, {group.key for group in taken.kept})
            | taken.numbers()
            | {
                "carried_groups": len(self._queue.keys),
                "sampled_tokens": self._tokens,
                "answers_lost": self._lost,
            }
        )

    # ---- the thread's side

    def _run(self) -> None:
        inbox = self._fleet.inbox
        while not self._ending:
            inbox.changed.wait(TICK)
            inbox.changed.clear()
            try:
                with self._lock:
                    self._advance()
            except Exception as error:  # raised where the trainer waits for the step's end
                self._error = error
                self._ready.set()
                return

    def _advance(self) -> None:
        """Take what has come, have it judged, and send what is wanted."""
        running = {group.key: group for group in self._queue.running()}
        for key, sample, response in [*self._take_lost(), *self._fleet.poll()]:
            self._tokens += len(response.token_ids)
            if key not in running:
                continue
            whole = self._whole(key, sample, response)
            if whole.weight_version == running[key].version:
                self._verdicts.ask(0, key, sample, self._prompts[key], whole)
            else:  # it waited at its server while the weights changed, and is of others than the rest of its group
                self._partial.setdefault(key, {})[sample] = whole
        for key, sample, response in self._verdicts.ready(0, len(self._verdicts), idle=False):
            self._queue.judged(key, sample, response)
        self._fleet.abort(self._queue.hopeless())
        self._send_lost_again()
        if not self._held:
            while self._fleet.room >= self._rollout.n or (self._fleet.room > 0 and not self._fleet.running()):
                ticket = self._queue.next()
                if ticket is None:
                    break
                self._prompts[ticket.key] = ticket.prompt
                for sample, request in ticket.requests:
                    self._fleet.send(ticket.key, sample, request)
            if self._queue.enough or (self._queue.exhausted and not len(self._verdicts)):
                self._ready.set()

    def _take_lost(self) -> list[tuple[int, int, Response]]:
        """Note lost answers, and what still runs of their groups, which is sent again with them. Those that had ended all the same are
        returned."""
        ended, lost = [], self._fleet.lost()
        self._lost += len(lost)
        self._losses.update({key for key, *_ in lost})
        if lost or self._partial:
            lost += self._fleet.withdraw({key for key, *_ in lost} | self._partial.keys())
        for key, sample, response in lost:
            if response.finish_reason != "unfinished":
                ended.append((key, sample, response))
            else:
                self._tokens += len(response.token_ids)
                self._partial.setdefault(key, {})[sample] = self._whole(key, sample, response)
        return ended

    def _send_lost_again(self) -> None:
        """Groups with lost answers go back to the queue as soon as nothing of them is under way: with what they had where they may go on
        from there, or from the start. The latter waits for the end of a sync, so that all of a group is started from one version."""
        running = {group.key: group for group in self._queue.running()} if self._partial else {}
        for key, partial in list(self._partial.items()):
            if (group := running.get(key)) is None:
                del self._partial[key]
            elif self._losses[key] > MOST_LOSSES:
                self._queue.give_up(key)
                self._fleet.abort({key})
                del self._partial[key]
            elif all(sample in partial or has_verdict(known) for sample, known in enumerate(group.responses)):
                begun = all(_has_begun(group, response) for response in partial.values())
                if begun and self._queue.resumes:
                    self._queue.pause(key, begun, self._partial.pop(key))
                elif not self._held:
                    self._queue.put_back(key)
                    del self._partial[key]

    def _known(self, group: Open, sample: int, so_far: Response | None) -> Response | None:
        """What there is of an answer; so_far: at its server."""
        known = group.responses[sample]
        if has_verdict(known):
            return known
        return self._partial.get(group.key, {}).get(sample) or self._whole(group.key, sample, so_far)

    def _whole(self, key: int, sample: int, response: Response | None) -> Response | None:
        """An answer that was resumed, from its beginning."""
        before = self._queue.so_far(key, sample)
        if before is None or before.verdict is not None:
            return response
        if response is None:
            return before
        return before.followed_by(response, self._decode(before.token_ids + response.token_ids))


def _has_begun(group: Open, response: Response | None) -> bool:
    """Whether an answer has a token, and that of the weights that the others of its group were started from."""
    return response is not None and bool(response.token_ids) and response.weight_version == group.version

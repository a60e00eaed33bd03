"""What is sent to the sampler and in which order, when a rollout step has enough groups, and what becomes of the others.

Nothing here knows of vLLM or of ranks: whoever drives a Queue tells it what became of an answer. Queues that are told the same say the
same, so that every rank can have one of its own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.mixing import LEAST_SHARE, chance, is_short
from megatron_nft.rewards.length import is_dropped, settle
from megatron_nft.rollout.seeds import seed_of
from megatron_nft.rollout.settings import Request
from megatron_nft.trajectories import Group, Prompt, Response

if TYPE_CHECKING:
    from megatron_nft.prompts import Cursor

FIRST_SHARE = (1.0, 3.0)  # mixed groups of so many are assumed at first: the published runs send three times what they keep
MEMORY = 0.5  # of that share, from one step to the next


@dataclass(frozen=True)
class Ticket:
    """Answers to be sampled: those of a group, or what is missing of it."""

    key: int
    prompt: Prompt
    requests: list[tuple[int, Request]]  # with the number of the answer in its group


@dataclass
class Open:
    """A group from the moment it is sent until it is trained on or given up."""

    key: int  # the number of the prompt among all that were sent: the order of starting
    prompt: Prompt
    version: int  # of the weights that all of its answers were started from
    requests: list[Request]
    responses: list[Response | None]  # judged ones, and what there is of unfinished ones
    step: int = 0  # in which it was sent: with `first` part of its seeds
    first: int = 0  # number of its first answer among those that were asked of the prompt in that step
    mark: object = None  # where the cursor stood before the prompt; None: it did not come from there
    holder: int | None = None  # the engine that has its answers
    drops_truncated: bool = False
    finished: int = 0  # its number in the order of completion
    left: int = 0  # answers without a verdict
    known: int = 0  # those with one, that count
    scores: set[float] = field(default_factory=set)  # the verdicts so far

    @property
    def judged(self) -> list[Response]:
        """The answers that count: with a verdict, and not dropped."""
        return [r for r in self.responses if has_verdict(r) and not (self.drops_truncated and is_dropped(r))]

    @property
    def is_complete(self) -> bool:
        return not self.left

    @property
    def is_mixed(self) -> bool:
        """Known before the group is complete: two of its verdicts differ."""
        return len(self.scores) > 1

    def count(self) -> None:
        """Bring `left` and `scores` up to date with the responses."""
        self.left = sum(not has_verdict(response) for response in self.responses)
        judged = self.judged
        self.known, self.scores = len(judged), {response.verdict.score for response in judged}

    def group(self) -> Group:
        """With the answers that count."""
        return Group(self.prompt, self.judged, self.key)


def has_verdict(response: Response | None) -> bool:
    """Whether an answer is there and judged."""
    return response is not None and response.verdict is not None


@dataclass
class Taken:
    """What a rollout step ends with. Groups in the order of starting, but for `kept` with rollout.order finished."""

    kept: list[Open]  # to train on
    uniform: list[Open] = field(default_factory=list)  # complete, and nothing to learn from
    surplus: list[Open] = field(default_factory=list)  # complete and mixed, and more than wanted: thrown away
    hopeless: list[Open] = field(default_factory=list)  # given up before they were complete
    stale: list[Open] = field(default_factory=list)  # thrown away at the begin of the step: too old

    @property
    def decided(self) -> list[Open]:
        """What the step's statistics are about."""
        return sorted([*self.kept, *self.uniform, *self.surplus], key=lambda group: group.key)

    def numbers(self) -> dict[str, int]:
        """How many groups the step did not train on, for what reason."""
        return {f"{name}_groups": len(getattr(self, name)) for name in ("surplus", "hopeless", "stale")}


class Queue:
    """See the methods, in the order of their use. Keys number the groups of a run; samples the answers of a group, from 0."""

    def __init__(self, cursor: "Cursor", config: Config):
        self._cursor, self._seed, self._rollout, self._reward = cursor, config.seed, config.rollout, config.reward
        self._per_update = config.train.prompts_per_update
        self._in_prompt_order = config.rollout.order == "prompt"
        self._open: dict[int, Open] = {}  # by key, which is the order of starting
        self._again: list[Prompt] = []  # prompts to be sent before the cursor's next
        self._share = list(FIRST_SHARE)  # mixed, complete
        self._sent = self._completed = 0
        self._step = self._version = self.started = 0
        self._asked: Counter = Counter()  # answers of a prompt in this step: one that comes again gets new seeds
        self._hopeless: list[Open] = []
        self._stale: list[Open] = []
        self._waiting: set[int] = set()  # keys of the groups that wait
        self._counts: tuple[int, Counter] | None = None  # what _known and _ready found, until something changes
        self._chosen: list[Open] | None = None

    # ---- a step

    def begin(self, step: int, version: int) -> list[int]:
        """A rollout step with weights of this version. Returns the keys of groups that are thrown away, being older than max_staleness:
        what still runs of them is to be aborted; the prompts of those that were not complete are sent anew."""
        self._step, self._version, self.started, self._hopeless = step, version, 0, []
        self._asked.clear()
        self._share = [MEMORY * count for count in self._share]
        self._stale = [group for group in self._open.values() if version - group.version > self._rollout.max_staleness]
        self._remove(self._stale)
        self._again += [group.prompt for group in self._stale if not group.is_complete]
        return [group.key for group in self._stale]

    def next(self, holder: int | None = None) -> Ticket | None:
        """What to send now, to the engine `holder`; None where nothing more is wanted for now. Groups that wait go first, to the engine
        that has their beginnings."""
        for key in sorted(self._waiting):
            group = self._open[key]
            if group.holder in (None, holder):
                self._waiting.discard(key)
                group.holder = holder
                return Ticket(group.key, group.prompt, list(self._missing(group)))
        if not self._wants_more():
            return None
        group = self._start(holder)
        return Ticket(group.key, group.prompt, list(enumerate(group.requests)))

    def so_far(self, key: int, sample: int) -> Response | None:
        """What a resumed answer had before: its token ids come before those of the request's answer."""
        return self._open[key].responses[sample] if key in self._open else None

    def judged(self, key: int, sample: int, response: Response) -> None:
        """An answer is finished and has its verdict. Of a group that is gone, or an answer that has one already, nothing happens."""
        group = self._open.get(key)
        if group is None or has_verdict(group.responses[sample]):
            return
        settle(response, self._reward, self._rollout.max_tokens)
        group.responses[sample] = response
        group.count()
        self._changed()
        if group.is_complete:
            self._completed += 1
            group.finished = self._completed
            self._share[0] += group.is_mixed
            self._share[1] += 1

    def hopeless(self) -> list[int]:
        """Give up the groups of which rollout.hopeless_after answers are judged, all alike; what runs of them is to be aborted."""
        after = self._rollout.hopeless_after
        if after is None:
            return []
        found = [g for g in self._open.values() if not g.is_complete and g.known >= after and not g.is_mixed]
        self._remove(found)
        self._hopeless += found
        self._share[1] += len(found)  # as good as uniform
        return [group.key for group in found]

    def give_up(self, key: int) -> None:
        """Nobody can answer the group's prompt: it counts with the hopeless ones."""
        if (group := self._open.get(key)) is not None:
            self._remove([group])
            self._hopeless.append(group)

    def put_back(self, key: int) -> None:
        """An engine lost the group's running answers: they are sent again from their beginnings. What is judged stays, unless the weights
        have changed: all answers of a group are started from one version."""
        if (group := self._open.get(key)) is not None and not group.is_complete:
            keep = group.version == self._version
            group.responses = [r if keep and has_verdict(r) else None for r in group.responses]
            group.count()
            group.holder, group.version = None, self._version
            self._wait(group)

    @property
    def enough(self) -> bool:
        """Whether the step has the groups it wants."""
        return len(self._ready()) == self._rollout.prompts_per_step

    @property
    def exhausted(self) -> bool:
        """Whether nothing is under way and nothing more will be sent, however many groups there are."""
        return all(group.is_complete for group in self._open.values()) and not self._wants_more()

    def take(self) -> Taken:
        """End the step: the groups to train on, whole mini-batches where there is one at least (an update on a fraction of one would be
        another step size), and what goes with them. The rest stays; what runs of it goes on, or is told of by `pause`."""
        ready, enough = self._ready(), self.enough
        taken = Taken(ready[: self._number_kept(len(ready))], hopeless=self._hopeless, stale=self._stale)
        if self._in_prompt_order and enough:
            self._rewind_to(ready[-1].key)
        taken.uniform = [group for group in self._open.values() if group.is_complete and not self._usable(group)]
        if not self._rollout.max_staleness or not self._rollout.dynamic_sampling:
            kept = {group.key for group in taken.kept}
            taken.surplus = [g for g in self._open.values() if g.is_complete and g.key not in kept and self._usable(g)]
        self._remove(taken.decided)
        self._hopeless, self._stale = [], []
        for group in sorted([*taken.decided, *taken.hopeless], key=lambda group: group.key):
            if group.judged:
                self._cursor.remember(group.prompt, group.group().correct_rate, group.is_mixed)
        return taken

    @property
    def resumes(self) -> bool:
        """Whether unfinished answers go on in the next step."""
        return self._rollout.unfinished == "resume" and self._rollout.max_staleness > 0

    @property
    def keys(self) -> set[int]:
        """Of the groups that are open."""
        return set(self._open)

    def running(self) -> list[Open]:
        """Groups of which answers run."""
        return [group for group in self._open.values() if not group.is_complete and group.key not in self._waiting]

    def pause(self, key: int, begun: bool, partial: dict[int, Response]) -> None:
        """The engine has given up a group's running answers. begun: all of them had a token at least; partial: what they had, where this
        rank has it. They will go on, with rollout.unfinished resume, where they may become old enough; otherwise the prompt is sent anew
        before others."""
        group = self._open[key]
        if not (begun and self.resumes):
            self._remove([group])
            self._again.append(group.prompt)
            return
        for sample, response in partial.items():
            group.responses[sample] = response
        self._wait(group)

    # ---- for checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint keeps besides the cursor and the carried groups: plain values, fit for JSON."""
        groups = {str(group.key): [group.version, group.step, group.first, group.finished] for group in self._open.values()}
        again = [prompt.id for prompt in self._again]
        return {"share": list(self._share), "sent": self._sent, "completed": self._completed, "again": again, "groups": groups}

    def carried(self) -> list[Open]:
        """The groups that stay after a step, as they are now: what comes later does not change them."""
        return [replace(group, responses=list(group.responses), scores=set(group.scores)) for group in self._open.values()]

    def fitting(self, responses: list[Response]) -> list[Response]:
        """The answers of a carried group, where it is as the settings of now ask for: rollout.n of them, and those that are to go on below
        max_tokens. None otherwise."""
        n, most = self._rollout.n, self._rollout.max_tokens
        fits = len(responses) == n and all(has_verdict(r) or len(r.token_ids) < most for r in responses)
        return responses if fits else []

    def load(self, state: dict, groups: Iterable[tuple[int, str, int | None, list[Response]]]) -> None:
        """Go on where state_dict() and carried() were taken. groups: (key, prompt's id, holder, responses); where `fitting` leaves
        no responses, the prompt is sent anew."""
        self._share, self._sent, self._completed = list(state["share"]), state["sent"], state["completed"]
        self._again = [self._cursor.prompt(name) for name in state["again"]]
        for key, name, holder, responses in sorted(groups, key=lambda group: group[0]):
            version, step, first, finished = state["groups"][str(key)]
            prompt = self._cursor.prompt(name)
            if not responses:
                self._again.append(prompt)
                continue
            group = self._open[key] = self._new(key, prompt, version, step, first)
            group.responses, group.holder, group.finished = list(responses), holder, finished
            group.count()
            if not group.is_complete:
                self._wait(group)
        self._changed()

    # ---- inside

    def _usable(self, group: Open) -> bool:
        return group.is_mixed if self._rollout.dynamic_sampling else bool(group.judged)

    def _ready(self) -> list[Open]:
        """Groups that can be trained on, in the order asked for, no more than wanted."""
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> list[Open]:
        wanted, ready = self._rollout.prompts_per_step, []
        if self._rollout.order == "finished":
            done = [group for group in self._open.values() if group.is_complete and self._usable(group)]
            return sorted(done, key=lambda group: group.finished)[:wanted]
        for group in self._open.values():
            if len(ready) == wanted:
                break
            if group.is_complete and self._usable(group):
                ready.append(group)
            elif not group.is_complete and self._version - group.version >= self._rollout.max_staleness:
                break  # it is waited for: in the next step it would be too old, and to pass it over would favour short answers
        return ready

    def _wants_more(self) -> bool:
        rollout = self._rollout
        wanted = rollout.prompts_per_step
        if not rollout.dynamic_sampling:
            return self.started < wanted
        if self.started >= (rollout.max_prompts_per_step or 8 * wanted):
            return False
        mixed, undecided = self._known()
        share = max(self._share[0] / self._share[1], LEAST_SHARE)
        chances = [(chance(share, *kind), count) for kind, count in undecided.items()]
        promised = sum(p * count for p, count in chances)
        if is_short(promised, sum(p * (1 - p) * count for p, count in chances), wanted - mixed):
            return True
        # while the last answers of a step are waited for, the next one's are begun
        ahead = rollout.max_staleness if rollout.unfinished == "resume" or rollout.mode == "served" else 0
        return bool(ahead) and mixed + promised < wanted * (1 + ahead)

    def _known(self) -> tuple[int, Counter]:
        """How many open groups are known to be mixed; and those that may become so, by the number of their verdicts so far and of all."""
        if self._counts is None:
            mixed = sum(group.is_mixed for group in self._open.values())
            undecided = (group for group in self._open.values() if not group.is_complete and not group.is_mixed)
            self._counts = mixed, Counter((group.known, group.known + group.left) for group in undecided)
        return self._counts

    def _start(self, holder: int | None) -> Open:
        mark = None if self._again else self._cursor.mark()
        prompt = self._again.pop(0) if self._again else self._cursor.take(1)[0]
        group = self._open[self._sent] = self._new(self._sent, prompt, self._version, self._step, self._asked[prompt.id])
        group.mark, group.holder = mark, holder
        self._asked[prompt.id] += self._rollout.n
        self._sent, self.started = self._sent + 1, self.started + 1
        if self._counts is not None:
            self._counts[1][0, group.left] += 1  # nothing else changes by one more undecided group at the end
        return group

    def _new(self, key: int, prompt: Prompt, version: int, step: int, first: int) -> Open:
        drops = self._reward.truncated == "drop"
        requests = self._requests(prompt, first, step)
        return Open(key, prompt, version, requests, [None] * len(requests), step, first, drops_truncated=drops, left=len(requests))

    def _wait(self, group: Open) -> None:
        self._waiting.add(group.key)
        self._changed()

    def _requests(self, prompt: Prompt, first: int, step: int) -> list[Request]:
        """The n requests of a prompt, each with a seed of its own."""
        rollout = self._rollout
        return [
            Request(prompt.token_ids, rollout.temperature, rollout.top_p, rollout.max_tokens,
                    seed_of(self._seed, step, prompt.source, prompt.id, sample), tuple(rollout.stop))
            for sample in range(first, first + rollout.n)
        ]  # fmt: skip

    def _missing(self, group: Open) -> Iterable[tuple[int, Request]]:
        """The requests of answers that are not finished. One that is resumed keeps what is left of its length, and draws other numbers than
        at its beginning."""
        for sample, (request, known) in enumerate(zip(group.requests, group.responses, strict=True)):
            if known is None:
                yield sample, request
            elif not has_verdict(known):
                tokens = len(known.token_ids)
                yield sample, replace(request, token_ids=(*request.token_ids, *known.token_ids), max_tokens=request.max_tokens - tokens,
                                      seed=seed_of(request.seed, tokens))  # fmt: skip

    def _rewind_to(self, last: int) -> None:
        """Forget the groups that were started after the group `last`: their prompts come again, as if they had never been taken."""
        later = [group for group in self._open.values() if group.key > last]
        if later:
            self._again = [group.prompt for group in later if group.mark is None] + self._again
            if from_cursor := [group for group in later if group.mark is not None]:
                self._cursor.rewind(from_cursor[0].mark)
            self._sent = later[0].key
            self._remove(later)

    def _remove(self, groups: Iterable[Open]) -> None:
        for group in groups:
            self._open.pop(group.key, None)
            self._waiting.discard(group.key)
        self._changed()

    def _changed(self) -> None:
        self._counts = self._chosen = None

    def _number_kept(self, ready: int) -> int:
        return ready - ready % self._per_update if ready >= self._per_update else ready

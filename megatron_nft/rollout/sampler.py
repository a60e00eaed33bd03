"""Dynamic sampling: prompts are drawn until enough groups are mixed (0 < r̂ < 1), the only ones an objective learns from. Without it
one draw is all, and every group is trained on.

Every rank takes the same prompts from its copy of the cursor; prompt i of a draw is answered by engine i mod engines. What is
kept is decided from rates that all ranks have gathered, so the decision is the same everywhere.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.rewards.length import settle
from megatron_nft.rollout.engine import Engine, Request
from megatron_nft.rollout.seeds import seed_of
from megatron_nft.trajectories import OUTCOMES, Group, Prompt, Response
from megatron_nft.weights import Bucket

if TYPE_CHECKING:
    from megatron_nft.prompts import Cursor
    from megatron_nft.rewards.judge import Judge

MARGIN = 1.1  # a further draw asks for a tenth more than the mixed share so far promises ...
LEAST_SHARE = 0.1  # ... which is taken as no smaller than this


@dataclass
class Rollout:
    """What one rollout step sampled."""

    groups: list[Group]  # kept, this engine's, in prompt order; empty on ranks that are not their engine's first
    statistics: dict[str, float]  # over all engines, the same on every rank
    reward_seconds: float  # waited for verdicts after generation had ended, the longest of the engines
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GroupSummary:
    """What the other engines learn of a group."""

    position: int  # of the prompt within the step
    rates: tuple[float, ...]  # the verdicts of its answers, dropped ones left out; may be empty
    lengths: tuple[int, ...]  # of these answers, in tokens
    sampled: int  # answers, dropped ones included
    sampled_tokens: int
    truncated: int  # answers that ended by length, dropped ones included
    outcomes: Counter  # of all sampled answers

    @property
    def correct_rate(self) -> float:
        """r̂."""
        return sum(self.rates) / len(self.rates)

    @property
    def is_mixed(self) -> bool:
        """As Group.is_mixed."""
        return len(set(self.rates)) > 1


def summarise(position: int, group: Group, sampled: list[Response] | None = None) -> GroupSummary:
    """The summary of a judged group. `sampled`: all of its answers, where some have been dropped."""
    sampled = group.responses if sampled is None else sampled
    return GroupSummary(
        position=position,
        rates=tuple(response.verdict.score for response in group.responses),
        lengths=tuple(len(response.token_ids) for response in group.responses),
        sampled=len(sampled),
        sampled_tokens=sum(len(response.token_ids) for response in sampled),
        truncated=sum(response.finish_reason == "length" for response in sampled),
        outcomes=Counter(response.verdict.outcome for response in sampled),
    )


def answer(
    engine: Engine,
    judge: "Judge | None",
    prompts: list[Prompt],
    requests: list[list[Request]],
    on_finish: Callable[[int, Response], None] | None = None,
) -> tuple[list[Group], float]:
    """Sample and judge this engine's prompts; requests[i] are those of prompts[i]. Called by every rank, with or without prompts.

    Verdicts start as answers finish; on_finish(index, response) is called then, too. Returns the groups ([] on a rank that is not
    its engine's first, which has no judge to ask) and the seconds spent waiting for verdicts when generation had ended.
    """
    owner = [i for i, own in enumerate(requests) for _ in own]
    verdicts: list[Future | None] = [None] * len(owner)

    def submit(index: int, response: Response) -> None:
        if engine.is_first:
            verdicts[index] = judge.submit(response.text, prompts[owner[index]])
        if on_finish is not None:
            on_finish(index, response)

    responses = engine.generate([request for own in requests for request in own], submit)
    if not engine.is_first:
        return [], 0.0
    begin = time.perf_counter()
    groups = [Group(prompt) for prompt in prompts]
    for i, response, verdict in zip(owner, responses, verdicts, strict=True):
        response.verdict = verdict.result()
        groups[i].responses.append(response)
    return groups, time.perf_counter() - begin


class Sampler:
    """The colocated sampler: this rank's engine, the judge of the answers, and the cursor, whose state is all a checkpoint needs.

    The judge may be None on ranks where `engine.is_first` is false.
    """

    def __init__(self, engine: Engine, judge: "Judge | None", cursor: "Cursor", config: Config):
        self._engine, self._judge, self._cursor = engine, judge, cursor
        self._seed, self._rollout, self._prompts_per_update = config.seed, config.rollout, config.train.prompts_per_update
        self._reward = config.reward
        self._per_draw = config.rollout.prompts_per_draw or config.rollout.prompts_per_step

    def groups(self, step: int) -> Rollout:
        """Draw until rollout.prompts_per_step groups are mixed, or max_draws is reached; with dynamic_sampling false, draw once and keep
        every group that has an answer. A collective call.

        Deterministic in (config.seed, step, the cursor) whatever the number of engines.
        """
        wanted, draws, waited, dynamic = self._rollout.prompts_per_step, 0, 0.0, self._rollout.dynamic_sampling
        own: dict[int, Group] = {}
        summaries: list[GroupSummary] = []
        usable: list[int] = []
        asked: Counter = Counter()
        count = self._per_draw if dynamic else wanted
        while count and draws < self._rollout.max_draws:
            groups, made, seconds = self._draw(step, count, len(summaries), asked)
            own |= groups
            gathered = self._engine.gather((made, seconds))
            summaries += sorted((s for part, _ in gathered for s in part), key=lambda s: s.position)
            usable = [s.position for s in summaries if (s.is_mixed if dynamic else s.rates)]
            waited, draws = waited + max(seconds for _, seconds in gathered), draws + 1
            count = self._next_count(wanted - len(usable), len(usable) / len(summaries)) if dynamic else 0
        kept = usable[: self._number_kept(len(usable))]
        statistics = _statistics(summaries, set(kept)) | {"surplus_groups": len(usable) - len(kept), "draws": draws}
        self._engine.sleep()  # on a GPU training needs the memory; sync wakes it
        return Rollout(
            [own[position] for position in kept if position in own], statistics, waited, self._warnings(len(kept), len(usable), draws)
        )

    def sync(self, buckets: Iterator[Bucket], version: int) -> None:
        """New weights for the engine, as Engine.sync takes them."""
        self._engine.sync(buckets, version)

    def _draw(self, step: int, count: int, first: int, asked: Counter) -> tuple[dict[int, Group], list[GroupSummary], float]:
        """Take `count` prompts and answer this engine's share: {position in the step: group}, their summaries, and seconds waited for
        verdicts.

        `asked` numbers the samples: a prompt that comes again within the step (a small data set) gets new answers, not the same.
        """
        prompts, numbers = self._cursor.take(count), []
        for prompt in prompts:
            numbers.append(asked[prompt.source, prompt.id])
            asked[prompt.source, prompt.id] += self._rollout.n
        share = range(self._engine.index, count, self._engine.count)
        requests = [self._requests(step, prompts[i], numbers[i]) for i in share]
        groups, seconds = answer(self._engine, self._judge, [prompts[i] for i in share], requests)
        summaries = []
        for i, group in zip(share, groups, strict=False):
            group.position, sampled = first + i, group.responses
            settle(group, self._reward, self._rollout.max_tokens)
            summaries.append(summarise(group.position, group, sampled))
        return {group.position: group for group in groups}, summaries, seconds

    def _requests(self, step: int, prompt: Prompt, first: int) -> list[Request]:
        """The n requests of a prompt, each with a seed of its own."""
        rollout = self._rollout
        return [
            Request(prompt.token_ids, rollout.temperature, rollout.top_p, rollout.max_tokens,
                    seed_of(self._seed, step, prompt.source, prompt.id, sample))
            for sample in range(first, first + rollout.n)
        ]  # fmt: skip

    def _next_count(self, missing: int, mixed_share: float) -> int:
        """How many prompts to draw next; 0 when nothing is missing."""
        return min(math.ceil(MARGIN * max(missing, 0) / max(mixed_share, LEAST_SHARE)), self._per_draw)

    def _number_kept(self, mixed: int) -> int:
        """Whole mini-batches where there is one at least: an update on a fraction of a mini-batch would be another step size."""
        kept = min(mixed, self._rollout.prompts_per_step)
        return kept - kept % self._prompts_per_update if kept >= self._prompts_per_update else kept

    def _warnings(self, kept: int, usable: int, draws: int) -> list[str]:
        if kept == self._rollout.prompts_per_step:
            return []
        then = f"training on {kept}, whole mini-batches" if kept else "no update in this step"
        if not self._rollout.dynamic_sampling:
            return [f"only {usable} of {self._rollout.prompts_per_step} groups have an answer that was not cut off: {then}"]
        return [f"only {usable} of {self._rollout.prompts_per_step} groups are mixed after {draws} draws: {then} "
                "(easier or harder prompts, more answers a prompt or a higher rollout.max_draws would give more)"]  # fmt: skip


def _statistics(summaries: list[GroupSummary], kept: set[int]) -> dict[str, float]:
    """Numbers of one step over all sampled groups, kept or not. Rates and lengths leave dropped answers out."""
    answered = [s for s in summaries if s.rates]
    rates = [s.correct_rate for s in answered]
    kept_rates = [s.correct_rate for s in answered if s.position in kept]
    lengths = [length for s in answered for length in s.lengths]
    outcomes = sum((s.outcomes for s in summaries), Counter())
    return {
        "correct_rate": sum(rates) / max(len(rates), 1),
        "kept_correct_rate": sum(kept_rates) / max(len(kept_rates), 1),
        "mixed_share": sum(s.is_mixed for s in summaries) / len(summaries),
        "all_right_share": sum(rate == 1.0 for rate in rates) / len(summaries),
        "all_wrong_share": sum(rate == 0.0 for rate in rates) / len(summaries),
        "prompts_sent": len(summaries),
        "groups_kept": len(kept),
        "response_length": sum(lengths) / max(len(lengths), 1),
        "truncated_share": sum(s.truncated for s in summaries) / sum(s.sampled for s in summaries),
        "sampled_tokens": sum(s.sampled_tokens for s in summaries),
        **{f"outcome/{name}": outcomes[name] for name in OUTCOMES},
    }

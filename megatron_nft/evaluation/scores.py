"""From verdicts to numbers: avg@k, pass@j, maj@k and their intervals.

Every number is a mean over problems of something that is known of each problem: avg@k of the mean of its k verdicts, pass@j of the chance
that j of its k answers hold a right one, maj@k of the verdict of the answer that most of the k gave. The 95 % intervals resample problems
(percentile bootstrap, 2,000 resamples): answers to one problem are not independent, problems are. Where all problems are alike the
interval has no width, which says more about the number of problems than about the model. A greedy accuracy is a share of yes-or-no
trials and has Wilson's interval, unless a verdict function gives parts of a point.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy

from megatron_nft.config import SetSampling
from megatron_nft.trajectories import OUTCOMES, Response

RESAMPLES = 2000  # of the bootstrap
_AT_A_TIME = 2**22  # numbers drawn


@dataclass(frozen=True)
class Answered:
    """What is told of the answers of one kind to one problem."""

    set: str
    position: int  # of the problem in the set
    id: str
    kind: str  # greedy | sampled
    scores: tuple[float, ...]  # of the verdicts
    outcomes: tuple[str, ...]
    found: tuple[str | None, ...]  # the answers as the verdict function found them
    lengths: tuple[int, ...]  # in tokens
    truncated: tuple[bool, ...]  # ended by its length

    @classmethod
    def of(cls, key: tuple[str, int], name: str, kind: str, responses: list[Response]) -> "Answered":
        """key: the set, and the position in it; name: the problem's id."""
        verdicts = [response.verdict for response in responses]
        return cls(*key, name, kind, tuple(v.score for v in verdicts), tuple(v.outcome for v in verdicts), tuple(v.found for v in verdicts),
                   tuple(len(r.token_ids) for r in responses), tuple(r.finish_reason == "length" for r in responses))  # fmt: skip

    @property
    def key(self) -> tuple[str, int]:
        """Which problem."""
        return self.set, self.position

    @property
    def correct(self) -> int:
        """How many answers are right."""
        return self.outcomes.count("right")

    @property
    def score(self) -> float:
        """The mean verdict."""
        return sum(self.scores) / len(self.scores)


def set_result(answered: list[Answered], sampling: SetSampling) -> dict:
    """The numbers of one set, all of whose problems are answered, under the names they have in evaluations/NAME.json."""
    greedy, sampled = ([one for one in answered if one.kind == kind] for kind in ("greedy", "sampled"))
    result: dict = {"problems": len(greedy or sampled)}
    if greedy:
        result["greedy"] = sum(one.score for one in greedy) / len(greedy)
        scores = [one.score for one in greedy]
        result["greedy_interval"] = wilson(result["greedy"], len(greedy)) if {*scores} <= {0.0, 1.0} else mean_interval([scores])
    if sampled:
        result |= _sampled_result(sampled, sampling.k)
    return result | answers_told(answered) | {"by_problem": _by_problem(greedy, sampled)}


def _sampled_result(sampled: list[Answered], k: int) -> dict:
    columns = {f"avg@{k}": [one.score for one in sampled]}
    columns |= {f"pass@{j}": [pass_at(j, k, one.correct) for one in sampled] for j in powers(k)}
    if tells_answers(sampled):
        columns[f"maj@{k}"] = [majority(one.found, one.scores) for one in sampled]
    means = resampled_means(numpy.array(list(columns.values())).T, seed=0)
    intervals = numpy.quantile(means, (0.025, 0.975), axis=0).T
    result: dict = {}
    for (name, values), interval in zip(columns.items(), intervals, strict=True):
        result |= {name: sum(values) / len(values), f"{name}_interval": tuple(map(float, interval))}
    return result


def answers_told(answered: list[Answered]) -> dict:
    """Lengths, endings and outcomes of all answers, greedy and sampled ones together. None where there is no such answer."""
    pairs = [pair for one in answered for pair in zip(one.lengths, one.outcomes, strict=True)]
    outcomes = Counter(outcome for _, outcome in pairs)
    truncated = [cut for one in answered for cut in one.truncated]
    return {
        "response_length": _mean([length for length, _ in pairs]),
        "response_length_right": _mean([length for length, outcome in pairs if outcome == "right"]),
        "response_length_wrong": _mean([length for length, outcome in pairs if outcome != "right"]),
        "truncated_share": _mean(truncated),
        "no_answer_share": outcomes["no_answer"] / len(pairs),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
    }


def _by_problem(greedy: list[Answered], sampled: list[Answered]) -> list[dict]:
    """For each problem its id and, of the sampled answers, how many there are, how many are right, and their mean verdict; and greedy's."""
    rows: dict[int, dict] = {}
    for one in sampled:
        rows[one.position] = {"id": one.id, "n": len(one.scores), "correct": one.correct, "score": one.score}
    for one in greedy:
        rows.setdefault(one.position, {"id": one.id})["greedy"] = one.score
    return [rows[position] for position in sorted(rows)]


def mean_of_sets(results: dict[str, dict], samplings: dict[str, SetSampling]) -> dict:
    """The means over sets, each set counting the same, with intervals that resample the problems of each: of avg@k where every set has it,
    and of greedy likewise. Empty where there is one set alone."""
    found = {}
    for kind, has in (("avg", lambda s: s.k > 0), ("greedy", lambda s: s.greedy)):
        if len(results) > 1 and all(map(has, samplings.values())):
            key = "score" if kind == "avg" else "greedy"
            values = [[row[key] for row in result["by_problem"]] for result in results.values()]
            names = {name: f"avg@{samplings[name].k}" if kind == "avg" else "greedy" for name in results}
            found[kind] = {"value": _mean([_mean(of_set) for of_set in values]), "interval": mean_interval(values), "of": names}
    return found


def mean_interval(values: list[list[float]], resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of the mean over sets of the means over their problems."""
    means = sum(resampled_means(numpy.array(of_set)[:, None], seed=i, resamples=resamples)[:, 0] for i, of_set in enumerate(values))
    low, high = numpy.quantile(means / len(values), (0.025, 0.975))
    return float(low), float(high)


def powers(k: int) -> list[int]:
    """1, 2, 4 ... and k."""
    return [*(2**i for i in range(k.bit_length()) if 2**i < k), k]


def pass_at(j: int, n: int, correct: int) -> float:
    """The chance that j answers, drawn from n without putting back, hold one of those that are right: 1 - C(n - c, j) / C(n, j), the
    unbiased estimate of pass@j (arXiv 2107.03374, Eq. 1)."""
    return 1 - math.comb(n - correct, j) / math.comb(n, j)


def majority(found: tuple[str | None, ...], scores: tuple[float, ...]) -> float:
    """The verdict of the answer that was found most often; of several found equally often, the mean of theirs. Responses without an answer
    have no vote; 0 where none has one."""
    votes = defaultdict(list)
    for answer, score in zip(found, scores, strict=True):
        if answer is not None:
            votes[answer].append(score)
    most = max(map(len, votes.values()), default=0)
    return _mean([_mean(cast) for cast in votes.values() if len(cast) == most]) or 0.0


def tells_answers(answered: list[Answered]) -> bool:
    """Whether the verdict function says which answer it found, of every response in which it found one."""
    pairs = [pair for one in answered for pair in zip(one.outcomes, one.found, strict=True)]
    return not any(found is None and outcome in ("right", "wrong") for outcome, found in pairs)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent yes-or-no trials (Wilson 1927); sensible at 0 and 1, too."""
    z = 1.959964
    centre, spread = rate + z * z / (2 * count), z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def resampled_means(values: numpy.ndarray, seed: int, resamples: int = RESAMPLES) -> numpy.ndarray:
    """Means over problems of resampled problems, the same problems for all columns: [problems, columns] -> [resamples, columns]."""
    problems = len(values)
    generator, means = numpy.random.default_rng(seed), []
    for first in range(0, resamples, rows := max(1, _AT_A_TIME // problems)):
        drawn = generator.multinomial(problems, numpy.full(problems, 1 / problems), size=min(rows, resamples - first))
        means.append(drawn @ values / problems)
    return numpy.concatenate(means)


def _mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None

"""Which rank is the slowest in a stage, and by how much: a GPU that has throttled or a node with a bad link holds up all the others."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_nft.config import STAGES

TOLD_FROM = 1.1  # times the mean
TOLD_SECONDS = 1.0  # and so much more than it: short stages are never equal
TOLD_EVERY = 10  # steps, of the same stage


@dataclass
class Balance:
    """Compares the ranks' seconds. `compare` is collective.

    gather: a rank's numbers to those of all ranks, in their order. hosts: the machine of each rank.
    """

    gather: Callable[[list[float]], list[list[float]]]
    hosts: list[str]
    _told: dict[str, int] = field(default_factory=dict)  # the step in which a stage was last told of

    def compare(self, step: int, seconds: dict[str, float]) -> tuple[dict[str, float | str], list[str]]:
        """The metrics of a step, and lines to be shown. seconds: this rank's, by stage.

        balance/<stage> is the slowest rank's seconds over the mean of all; balance/<stage>_slowest names that rank and its machine.
        """
        metrics, lines = {}, []
        if len(self.hosts) == 1:
            return metrics, lines
        everyone = self.gather([seconds.get(stage, 0.0) for stage in STAGES])
        for stage, column in zip(STAGES, zip(*everyone, strict=True), strict=True):
            slowest, mean = max(column), sum(column) / len(column)
            if mean <= 0:
                continue
            rank = column.index(slowest)
            who = f"rank {rank} on {self.hosts[rank]}"
            metrics |= {f"balance/{stage}": slowest / mean, f"balance/{stage}_slowest": who}
            if self._is_news(step, stage, slowest, mean):
                lines.append(f"step {step}: {stage}: {who} was busy for {slowest:.1f} s, {slowest / mean:.2f} times the ranks' mean")
        return metrics, lines

    def _is_news(self, step: int, stage: str, slowest: float, mean: float) -> bool:
        if slowest < TOLD_FROM * mean or slowest - mean < TOLD_SECONDS or step < self._told.get(stage, -TOLD_EVERY) + TOLD_EVERY:
            return False
        self._told[stage] = step
        return True

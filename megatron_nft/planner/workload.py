"""What a rollout step works on: how long answers are, how many are sampled, what is trained on. Draws are seeded, the same each time."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from megatron_nft.config import Config

SEED = 20_250_518  # of all draws: a plan is the same each time
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Workload:
    """Answers are log-normal in length and cut at `cap`; each group is mixed with the probability `mixed`."""

    wanted: int  # groups that are trained on in a rollout step
    n: int  # answers of a group
    prompt: int  # tokens
    mean: float  # tokens of an answer before the cut
    sigma: float  # of the logarithm
    cap: int
    mixed: float  # 1 where all groups are kept
    per_update: int  # groups

    @classmethod
    def of(cls, config: Config) -> "Workload":
        """From config.plan, rollout and train."""
        plan, rollout = config.plan, config.rollout
        return cls(
            wanted=rollout.prompts_per_step,
            n=rollout.n,
            prompt=min(plan.mean_prompt_length, config.data.max_prompt_length),
            mean=plan.mean_response_length or rollout.max_tokens / 4,
            sigma=plan.response_length_sigma,
            cap=rollout.max_tokens,
            mixed=plan.mixed_share if rollout.dynamic_sampling else 1.0,
            per_update=min(config.train.prompts_per_update, rollout.prompts_per_step),
        )

    @property
    def location(self) -> float:
        """The mean of the logarithm."""
        return math.log(self.mean) - self.sigma**2 / 2

    @property
    def mean_length(self) -> float:
        """Tokens of an answer after the cut: E min(X, cap)."""
        if not self.sigma:
            return min(self.mean, self.cap)
        z = (math.log(self.cap) - self.location) / self.sigma
        return self.mean * _NORMAL.cdf(z - self.sigma) + self.cap * (1 - _NORMAL.cdf(z))

    @property
    def truncated(self) -> float:
        """The share of answers that the cap cuts."""
        if not self.sigma:
            return float(self.mean >= self.cap)
        return 1 - _NORMAL.cdf((math.log(self.cap) - self.location) / self.sigma)

    def quantile(self, share: float) -> float:
        """Tokens that `share` of the answers stay below."""
        return min(self.cap, math.exp(self.location + self.sigma * (_NORMAL.inv_cdf(share) if self.sigma else 0)))

    @property
    def updates(self) -> int:
        """Optimiser updates of a rollout step: a rest that is no whole mini-batch is left out."""
        return max(1, self.wanted // self.per_update)

    @property
    def kept_tokens(self) -> float:
        """Tokens of the answers that are trained on, prompts included."""
        return self.updates * self.per_update * self.n * (self.prompt + self.mean_length)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int [count]: lengths of answers."""
        lengths = np.exp(self.location + self.sigma * rng.standard_normal(count))
        return np.clip(np.rint(lengths), 1, self.cap).astype(np.int64)

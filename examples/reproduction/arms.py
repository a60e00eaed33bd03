"""The arms of the reproduction, and where a run of one lies."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_nft.config import Config, load
from megatron_nft.report import load_rows, with_sampled

COMMON = Path(__file__).with_name("common.yaml")

SEEDS = (1, 2, 3)
GREEDY, SAMPLED, ENTROPY = "validation/heldout/greedy", "validation/heldout/avg@4", "train/entropy"
# about the tokens of a mini-batch here, as the authors' is of theirs, so that the clip at 1.0 acts alike in all arms
CONSTANT = "objective.reduction_constant=1400"
OBJECTIVES = {
    "NFT": ("objective.name=nft", CONSTANT),
    "RFT": ("objective.name=rft", CONSTANT),
    "GRPO": ("objective.name=grpo",),
    "Dr.GRPO": ("objective.name=dr_grpo", CONSTANT),
    "DAPO": ("objective.name=dapo", "reward.overlong_buffer=12"),  # a fifth of the longest answer, as DAPO's
}
ABLATIONS = {
    **{f"eps {eps}": (*OBJECTIVES["NFT"], f"objective.eps={eps}") for eps in (0.1, 0.5, 2.0)},
    **{f"normalize {way}": (*OBJECTIVES["NFT"], f"objective.normalize={way}") for way in (0, 2)},
    **{f"neg_weight {weight}": (*OBJECTIVES["NFT"], f"objective.neg_weight={weight}") for weight in (0.0, 0.5)},
}
STRONG = "{}, strong base".format  # the same objective from the base that makes few mistakes
FROM_STRONG = {STRONG(name): overrides for name, overrides in OBJECTIVES.items()}
ARMS = {**OBJECTIVES, **ABLATIONS, **FROM_STRONG}


def _compared(config: Config) -> tuple:
    return config.seed, config.rollout, config.reward, config.objective, config.optimizer, config.train


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    name: str
    seed: int
    out: Path
    more: tuple[str, ...] = ()  # further overrides

    @property
    def directory(self) -> Path:
        return self.out / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower())}-seed{self.seed}"

    @property
    def base(self) -> str:
        """The base it starts from, "weak" or "strong"."""
        return "strong" if self.name in FROM_STRONG else "weak"

    @property
    def overrides(self) -> list[str]:
        return [*ARMS[self.name], f"seed={self.seed}", f"run_dir={self.directory}", *self.more]

    @property
    def complete(self) -> bool:
        """The report is the last thing that a training writes. Stops the program where the run was made with other settings."""
        if not (self.directory / "report.html").exists():
            return False
        done, wanted = (_compared(config) for config in (load(self.directory / "config.yaml"), load(COMMON, self.overrides)))
        if done != wanted:
            raise SystemExit(f"{self.directory} was made with other settings: remove it, or name another --out")
        return True

    def rows(self) -> list[dict]:
        """The run's metrics, with `sampled`: tokens sampled up to the row."""
        return with_sampled(load_rows(self.directory))

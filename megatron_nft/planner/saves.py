"""Checkpoints and answers of the whole run: bytes, files, stall and disk."""

import math
from dataclasses import dataclass

from megatron_nft.config import Config, best_kept
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.parameters import total
from megatron_nft.planner.times import Times
from megatron_nft.planner.workload import Workload

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}  # bytes
WEIGHT = 2  # bytes: bf16
# bytes of a token in rollouts/step_N.parquet: 5.0 for its id and log-prob in a file that record.py wrote of drawn answers, about 2 for
# its three or four letters of text, compressed
ANSWER_TOKEN = 7.0


@dataclass(frozen=True)
class Saves:
    """What a run writes. Bytes, unless said otherwise."""

    checkpoint: int  # one of them: weights, the optimizer's parameters and moments
    files: int  # that it has: Megatron's fully reshardable format is written by the ranks of the first replica
    largest_file: int
    count: int  # checkpoints that are made in the whole run
    kept: int  # of these at the end
    stall: float  # seconds that training waits for one
    answers: int  # of all steps, in rollouts/
    export: int  # the Hugging Face directory at the end
    disk: int  # at most: what is kept, the checkpoint that is being written, answers and export

    @classmethod
    def of(cls, config: Config, hf: dict, layout: Layout, spent: Times) -> "Saves":
        """Of a whole run of train.steps."""
        checkpoint, settings = config.checkpoint, config.optimizer
        parameters = total(hf)
        dtypes = (settings.main_params_dtype, settings.exp_avg_dtype, settings.exp_avg_sq_dtype)
        one = parameters * (WEIGHT + sum(WIDTHS[name] for name in dtypes))
        interval = checkpoint.interval or config.train.steps
        count = math.ceil(config.train.steps / interval) if config.train.steps else 0
        kept = min(count, checkpoint.keep + best_kept(config))
        work = Workload.of(config)
        kept_tokens = work.updates * work.per_update * work.n * work.mean_length  # of a rollout step
        answers = round(kept_tokens * config.train.steps * ANSWER_TOKEN) if config.rollout.save else 0
        export = WEIGHT * parameters if checkpoint.export else 0
        return cls(
            checkpoint=one, files=layout.tp * layout.pp, largest_file=-(-one // (layout.tp * layout.pp)), count=count, kept=kept,
            stall=spent.phases.get("save", 0.0) * interval, answers=answers, export=export,
            disk=(kept + (count > kept)) * one + answers + export,
        )  # fmt: skip

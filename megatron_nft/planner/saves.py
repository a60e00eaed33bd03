"""Checkpoints and answers of the whole run: bytes, files, stall and disk."""

import math
from dataclasses import dataclass

from megatron_nft.config import Config, best_kept
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.holdings import ITEMSIZE, MASTER, MOMENTS
from megatron_nft.planner.parameters import table_of, total
from megatron_nft.planner.workload import Workload
from megatron_nft.weights import padded_vocab_size

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
    def of(cls, config: Config, hf: dict, layout: Layout, steps: int, stall: float) -> "Saves":
        """Of a whole run of so many rollout steps. stall: seconds that training waits for a save."""
        checkpoint, one = config.checkpoint, checkpoint_bytes(config, hf)["checkpoint"]
        count = math.ceil(steps / (checkpoint.interval or steps)) if steps else 0
        kept = min(count, checkpoint.keep + best_kept(config))
        work = Workload.of(config)
        kept_tokens = work.updates * work.per_update * work.n * work.mean_length  # of a rollout step
        answers = round(kept_tokens * steps * ANSWER_TOKEN) if config.rollout.save else 0
        export = ITEMSIZE[config.model.precision] * total(hf) if checkpoint.export else 0
        return cls(
            checkpoint=one, files=layout.tp * layout.pp, largest_file=-(-one // (layout.tp * layout.pp)), count=count, kept=kept,
            stall=stall, answers=answers, export=export,
            disk=(kept + (count > kept)) * one + answers + export,
        )  # fmt: skip


def checkpoint_bytes(config: Config, hf: dict) -> dict[str, int]:
    """Bytes on the disk: "weights" in the model's precision, "optimizer" (float32 weights and both moments), and "checkpoint", a whole
    save. The padded rows of the vocabulary are saved, too."""
    padded = padded_vocab_size(hf["vocab_size"], config.parallel.tensor_model_parallel_size) - hf["vocab_size"]
    count = total(hf) + padded * hf["hidden_size"] * (1 if table_of(hf).tied else 2)
    saved = {name: count * nbytes for name, nbytes in parameter_bytes(config).items()}
    return saved | {"checkpoint": sum(saved.values())}


def parameter_bytes(config: Config) -> dict[str, int]:
    """Of a parameter in a checkpoint. Megatron saves the optimizer's state in float32, whatever dtype it is held in."""
    return {"weights": ITEMSIZE[config.model.precision], "optimizer": MASTER + MOMENTS}

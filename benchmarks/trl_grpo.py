"""The TRL side of benchmarks/against_trl.py, run by the Python of .venv-benchmarks: GRPOTrainer with a clock.

    .venv-benchmarks/bin/python [-m torch.distributed.run --nproc-per-node N] benchmarks/trl_grpo.py SETTINGS.json OUT.json

SETTINGS.json is what against_trl.py writes, its `trl` entry GRPOConfig's arguments. OUT.json gets "steps", one entry a rollout step:
{"seconds", "generate" (seconds), "updates", "answers", "tokens" (sampled, end tokens included), "right"}; and "versions".
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from megatron_nft.rewards.boxed import strict_box

VERSIONS = ("trl", "transformers", "torch")


class Clock(TrainerCallback):
    """Wall time of whole rollout steps: from the end of an optimiser update to the end of the one `updates` later."""

    def __init__(self, updates: int):
        self.updates, self.steps = updates, []
        self._started = self._judged = 0.0
        self._answers = self._tokens = self._right = 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first rollout step starts."""
        self._started = time.perf_counter()

    def judge(self, completions: list, completion_ids: list[list[int]], answer: list[str], **kwargs) -> list[float]:
        """The reward function, called once a rollout step, when all its answers are there."""
        self._judged = time.perf_counter()
        scores = [strict_box(turns[0]["content"], gold).score for turns, gold in zip(completions, answer)]
        self._answers += len(scores)
        self._tokens += sum(map(len, completion_ids))
        self._right += int(sum(scores))
        return scores

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """An optimiser update has ended; the last one of a rollout step ends that, too."""
        if state.global_step % self.updates:
            return
        now = time.perf_counter()
        counts = over_all_processes({"answers": self._answers, "tokens": self._tokens, "right": self._right}) | {"updates": self.updates}
        self.steps.append({"seconds": now - self._started, "generate": self._judged - self._started, **counts})
        self._started, self._answers, self._tokens, self._right = now, 0, 0, 0


def over_all_processes(counts: dict[str, int]) -> dict[str, int]:
    """Sums of each process's own answers."""
    if not dist.is_initialized():
        return counts
    sums = torch.tensor(list(counts.values()))
    dist.all_reduce(sums)
    return dict(zip(counts, sums.tolist()))


def questions(path: str) -> Dataset:
    """The prompts in the order of the file, as conversations, with their gold answers."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["problem"]}], "answer": row["answer"]} for row in rows])


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    clock = Clock(settings["updates"])

    def judge(**columns) -> list[float]:  # TRL asks a reward function for its __name__, and a bound method cannot be given one
        return clock.judge(**columns)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        args=GRPOConfig(**settings["trl"]),
        train_dataset=questions(settings["prompts"]),
        reward_funcs=judge,
        callbacks=[clock],
    )
    trainer.train()
    result = {"steps": clock.steps, "versions": {name: version(name) for name in VERSIONS}}
    if trainer.accelerator.is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

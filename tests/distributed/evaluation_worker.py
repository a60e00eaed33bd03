"""`megatron-nft evaluate` on fake engines of several ranks, each with a run directory of its own, as on nodes that share no disk."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_nft import policy
from megatron_nft.config import Config, EvaluationConfig, EvaluationSetConfig, RolloutConfig
from megatron_nft.errors import UserError
from megatron_nft.evaluation import answers as kept
from megatron_nft.evaluation import command
from megatron_nft.evaluation.evaluate import evaluate
from megatron_nft.evaluation.source import Source
from megatron_nft.prompts import PromptSet
from megatron_nft.rewards import Judge
from tests.support import ROOT
from tests.unit.rollout.fakes import CHANCE, MIXED, RIGHT, FakeEngine, fake_prompt

MODEL = ROOT / "examples/arithmetic/model"
SOURCE = Source(MODEL, MODEL, "m")
SETS = {"data": PromptSet([fake_prompt(kind, i) for i, kind in enumerate([RIGHT, CHANCE, MIXED, CHANCE, CHANCE, RIGHT])])}


class Engine(FakeEngine):
    """One of a rank."""

    def __init__(self, *_):
        super().__init__(3)
        self.count, self.index = dist.get_world_size(), dist.get_rank()

    def scale_cache_by(self, prompts) -> None:
        """An engine without an FP8 cache."""

    def close(self) -> None:
        """Nothing to free."""

    def _everyones(self, value: Any) -> list[Any]:
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def refused(config: Config) -> str:
    """What this rank is told."""
    try:
        command.evaluate_model(config, SOURCE, "fp32")
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    policy.start_distributed()
    rank, engines = dist.get_rank(), []
    config = Config(run_dir=f"{arguments['folder']}/{rank}", rollout=RolloutConfig(max_tokens=16),
                    evaluation=EvaluationConfig(k=2, sets=[EvaluationSetConfig("data.jsonl")]))  # fmt: skip
    config.model.path = str(MODEL)
    directory = kept.directory_of(config.run_dir, "m")
    with Judge((), "strict_box", 1, 1) as judge:
        alone = evaluate(FakeEngine(3), judge, SETS, config, str(MODEL), answers=kept.Answers(directory.with_name("alone"))).summary
    rows = [row for file in kept.files(directory.with_name("alone")) for row in kept.read(file)]
    kept.write(directory / "part-0-00000.parquet", [row for row in rows if row["position"] in arguments["answered"][rank]])
    command.load_sets, command.Engine = (lambda *_: SETS), (lambda *_: engines.append(Engine()) or engines[-1])
    command.publish = lambda run_dir, name, summary: json.dumps(summary)
    summaries, answer = [], command._answer
    command._answer = lambda *more: summaries.append(found := answer(*more)) or found
    with kept.held(directory) if rank == 0 else nullcontext():
        dist.barrier()
        said = refused(config)
        dist.barrier()
    command.evaluate_model(config, SOURCE, "fp32")
    same = [json.loads(json.dumps(one.summary)) == json.loads(json.dumps(alone)) for one in summaries]
    told = {"same": same, "asked": [len(one.requests) for one in engines], "said": said}
    (Path(arguments["folder"]) / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    policy.shutdown()


if __name__ == "__main__":
    main()

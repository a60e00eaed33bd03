"""Old log-probs and updates of answers with masked tokens inside, in float64, under many settings of the objective."""

import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from megatron_nft import objectives, policy
from megatron_nft.config import Config, CorrectionConfig, ObjectiveConfig
from megatron_nft.policy import exchange, optimizer
from tests.distributed.layout_worker import NoOptimizer, loss, tensors, wrap_float64
from tests.support import micro_batches_of

RATIOS, REDUCTIONS = ("token", "sequence", "geometric"), ("constant", "token-mean", "sequence-mean")
# where pi_old comes from: the sampler | a pass of its own | the update's own pass
FORMS = ("rollout", "recompute", "own")
PLACEHOLDERS = (float("nan"), 0.0)


def settings_of(number: int, name: str, ratio: str) -> ObjectiveConfig:
    """Every objective with every ratio; reductions and corrections in turn."""
    level = RATIOS[number % 3] if ratio == "token" else RATIOS[1 + number % 2]
    correction = CorrectionConfig(("truncate", "mask")[number // 3 % 2], level, cap=1.05, floor=0.9)
    more = {"clip_ratio_high": 0.2} if name == "cispo" else {}  # its own is so high that it never cuts
    return ObjectiveConfig(name=name, ratio=ratio, reduction=REDUCTIONS[number % 3], reduction_constant=10.0, correction=correction, **more)


ALL = {f"{name} {ratio}": settings_of(i, name, ratio) for i, (name, ratio) in enumerate(product(objectives.OBJECTIVES, RATIOS))}


def main() -> None:
    given = torch.load(sys.argv[1], weights_only=False)
    config = Config(run_dir="")
    config.model.path, config.model.precision = given["model"], "fp64"
    config.train.prompts_per_update, config.train.tokens_per_micro_batch = len(given["groups"]), 64
    topology = policy.initialize(config.parallel, config.seed)
    with mock.patch.object(optimizer, "wrap", wrap_float64), mock.patch.object(optimizer, "make", lambda *_: (NoOptimizer(), mock.Mock())):
        model = policy.Policy(config, topology)
    found = {}
    for (name, settings), form, filler in product(ALL.items(), FORMS, PLACEHOLDERS):
        groups = [replace(group, responses=[filled(r, filler) for r in group.responses]) for group in given["groups"]]
        found[name, form, str(filler)] = one(model, settings, form, groups)
    torch.save(found, Path(given["output"]))
    policy.shutdown()


def filled(response, filler: float):
    """The placeholder where the mask is 0."""
    values = [value if counts else filler for value, counts in zip(response.logprobs, response.mask(), strict=True)]
    return replace(response, logprobs=values)


def one(model: policy.Policy, settings: ObjectiveConfig, form: str, groups) -> dict:
    """Totals of the update, gradients, R and c."""
    config = model.config
    config.objective, config.train.old_logprobs = settings, "rollout" if form == "rollout" else "recompute"
    _, (batches,) = micro_batches_of(model, groups)
    measured = {}
    if form == "rollout":
        model.copy_old_logprobs(batches)
    elif form == "recompute":
        measured = model.fill_old_logprobs(batches, settings)
    watch = policy.Watch(exchange.table(groups)[0], 100, seed=1)
    totals = model.update(batches, partial(loss, settings=settings), objectives.METRICS, on_policy=form == "own", watch=watch)
    gradients = tensors(model.gathered(lambda parameter: parameter.main_grad))
    return {"totals": measured | totals, "gradients": gradients, "pushes": watch.collect(model.topology)}


if __name__ == "__main__":
    main()

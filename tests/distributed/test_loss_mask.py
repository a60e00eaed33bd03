"""Answers with masked tokens inside, as tools write them, train as if those tokens were part of the question.

The reference is transformers and autograd in float64: of every answer the log-probs of the trained tokens alone, every denominator
counted from them; the masked ones are context and never a target.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nft import objectives
from megatron_nft.trajectories import Group
from tests.distributed.mask_worker import ALL, FORMS, PLACEHOLDERS
from tests.distributed.reference import load
from tests.support import ROOT, as_in_files, made_up_groups, tiny_model

TOLERANCE = 2e-5
NOISE = 0.3  # of the sampler's log-probs


def masked_groups(model) -> list[Group]:
    """Some tokens of the answers are masked, all of one answer's; the sampler is near the model."""
    g = torch.Generator().manual_seed(5)
    groups = made_up_groups(prompts=3, n=4)
    for group in groups:
        for k, response in enumerate(group.responses):
            tokens = len(response.token_ids)
            keep = torch.rand(tokens, generator=g) < (0.0 if group.position == k == 1 else 0.6)
            response.loss_mask = keep.int().tolist()
            near = told(model, group, response)[0].detach() + NOISE * torch.randn(tokens, generator=g)
            response.logprobs = near.float().tolist()
    return groups


def told(model, group: Group, response) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of every token of an answer."""
    ids = torch.tensor([[*group.prompt.token_ids, *response.token_ids]])
    table = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1].log_softmax(-1)
    return table.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0], -(table.exp() * table).sum(-1).detach()


class Reference:
    """What a training that never sees the masked tokens as targets gives."""

    def __init__(self, model, groups: list[Group]):
        self.parameters, self.groups = dict(model.named_parameters()), groups
        pairs = [(group, response) for group in groups for response in group.responses]
        rows = [(told(model, *pair), torch.tensor(pair[1].loss_mask) == 1, pair[1]) for pair in pairs]
        self.logprobs = torch.cat([values[keep] for (values, _), keep, _ in rows])
        self.entropies = torch.cat([entropies[keep] for (_, entropies), keep, _ in rows])
        self.sampler = torch.cat([torch.tensor(r.logprobs, dtype=torch.float64)[keep] for _, keep, r in rows])
        self.counts = np.array([int(keep.sum()) for _, keep, _ in rows])
        self.index = torch.from_numpy(np.repeat(np.arange(len(rows)), self.counts))

    def spread(self, values) -> torch.Tensor:
        """A number of each answer, for its trained tokens."""
        return torch.tensor(np.asarray(values, np.float32), dtype=torch.float64)[self.index]

    def scales(self, settings) -> np.ndarray:
        trained, tokens = (self.counts > 0).sum(), self.counts.sum()
        one_term = settings.ratio != "token"
        means = {"token-mean": trained if one_term else tokens, "sequence-mean": trained * (1 if one_term else np.maximum(self.counts, 1))}
        return 1.0 / (means.get(settings.reduction, settings.reduction_constant) * np.ones(len(self.counts)))

    def update(self, settings, form: str) -> dict:
        """Totals, gradients by name, and R and c of the trained tokens."""
        verdicts = [np.array([r.verdict.score for r in group.responses]) for group in self.groups]
        ones = torch.ones_like(self.logprobs)
        old = self.sampler if form == "rollout" else self.logprobs.detach()
        factor, measured = objectives.measure(self.logprobs.detach(), self.entropies, self.sampler, ones, self.index, settings)
        inputs = objectives.Inputs(
            logprobs=self.logprobs,
            old_logprobs=old,
            verdict=self.spread(np.concatenate(verdicts)),
            correct_rate=self.spread(np.concatenate([v * 0 + v.mean() for v in verdicts])),
            weight=self.spread(np.concatenate([objectives.weights(v, v * 0, settings) for v in verdicts])),
            scale=self.spread(self.scales(settings)),
            correction=ones if form == "rollout" else factor,
            mask=ones,
            answer_index=self.index,
        )
        loss, metrics = objectives.loss(inputs, settings)
        names, tensors = zip(*self.parameters.items())
        gradients = torch.autograd.grad(loss, [*tensors, self.logprobs], retain_graph=True)
        totals = {"loss": loss.detach(), **metrics, **(measured if form != "rollout" else {})}
        return {
            "totals": {name: float(value) for name, value in totals.items()},
            "gradients": dict(as_in_files(zip(names, gradients))),
            "ratios": (self.logprobs - old).exp().tolist(),
            "coefficients": (-gradients[-1] / inputs.scale).tolist(),
        }


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict, Reference]:
    """What the program found, and the reference."""
    folder = tmp_path_factory.mktemp("masked")
    model = load(tiny_model(folder / "model"), torch.float64)
    groups = masked_groups(model)
    torch.save({"model": str(folder / "model"), "groups": groups, "output": str(folder / "found.pt")}, folder / "given.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    command = [sys.executable, str(Path(__file__).with_name("mask_worker.py")), str(folder / "given.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=False), Reference(model, groups)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_masked_tokens_are_no_targets(name, form, both):
    """Everything to 2e-5, which is what float32 rotary angles leave of float64; and no bit hangs on what a placeholder is."""
    found, reference = both
    got, zeros = (found[name, form, str(filler)] for filler in PLACEHOLDERS)
    assert got["totals"] == zeros["totals"] and got["pushes"] == zeros["pushes"]
    assert all(torch.equal(tensor, zeros["gradients"][key]) for key, tensor in got["gradients"].items())
    expected = reference.update(ALL[name], form)
    for key, value in expected["totals"].items():
        assert got["totals"][key] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), key
    for key, gradient in expected["gradients"].items():
        assert (got["gradients"][key] - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-9, key
    pushes = got["pushes"]
    assert [[r is not None for r in one.ratios] for one in pushes] == [r.loss_mask for g in reference.groups for r in g.responses]
    for field in ("ratios", "coefficients"):
        flat = [value for one in pushes for value in getattr(one, field) if value is not None]
        assert flat == pytest.approx(expected[field], rel=TOLERANCE, abs=1e-6), field


def test_the_answers_say_something(both):
    """Some tokens are masked within answers, one answer is masked whole, gradients are not zero, clips and corrections act."""
    found, reference = both
    assert 0 in reference.counts and 20 < reference.counts.sum() < sum(len(r.token_ids) for g in reference.groups for r in g.responses)
    for name in ALL:
        assert max(float(g.norm()) for g in found[name, "rollout", "nan"]["gradients"].values()) > 1e-3, name
        assert found[name, "recompute", "nan"]["totals"]["units_truncated"] > 0, name
    clipped = {name: found[name, "rollout", "nan"]["totals"] for name in ALL if name.endswith("token") and "rft" not in name}
    assert [name for name, totals in clipped.items() if not totals["right_clipped"] + totals["wrong_clipped"]] == []

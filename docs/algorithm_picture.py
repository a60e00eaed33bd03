"""Draws docs/algorithm.png: the split of the behaviour policy, and how hard each objective pushes a token, from objectives.py itself.

.venv/bin/python docs/algorithm_picture.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_nft.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, STYLE
from megatron_nft.config import ObjectiveConfig
from megatron_nft.objectives import OBJECTIVES, Inputs, weights

RATE = 0.25  # r̂: one right answer of four


def main() -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        split, right, wrong = figure.subplots(1, 3)
        _split(split)
        _pushes(right, verdict=1.0, title="a token of a right answer: push c up")
        _pushes(wrong, verdict=0.0, title="a token of a wrong answer: push c down")
        figure.savefig(Path(__file__).with_name("algorithm.png"), dpi=110)


def _split(axes: Axes) -> None:
    """Three distributions over made-up answers: what is sampled is the mixture of right and wrong ones."""
    answers = np.linspace(0, 1, 300)
    right, wrong = (np.exp(-0.5 * ((answers - at) / width) ** 2) for at, width in ((0.68, 0.08), (0.36, 0.16)))
    right, wrong = RATE * right / right.sum(), (1 - RATE) * wrong / wrong.sum()
    axes.fill_between(answers, 0, wrong, color=RED, alpha=0.25, linewidth=0, label="(1 - r̂) π⁻: wrong answers")
    axes.fill_between(answers, wrong, wrong + right, color=GREEN, alpha=0.35, linewidth=0, label="r̂ π⁺: right answers")
    axes.plot(answers, wrong + right, color=GREY, linewidth=2, label="π_old: what is sampled")
    axes.set(xticks=[], yticks=[], xlabel="answers to one question", title="π_old = r̂ π⁺ + (1 - r̂) π⁻")
    axes.legend(loc="upper right")


def _pushes(axes: Axes, verdict: float, title: str) -> None:
    """c against R at r̂ = 1/4, with the weights that make the objectives equal at R = 1."""
    ratios = torch.linspace(0.05, 3.0, 600, dtype=torch.float64)
    for name, label, colour, style in (
        ("nft", "NFT", BLUE, "-"), ("grpo", "GRPO", ORANGE, "--"), ("dapo", "DAPO", PURPLE, ":"), ("rft", "RFT", GREY, "-."),
    ):  # fmt: skip
        settings = ObjectiveConfig(name, normalize=2)
        weight = weights(np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4), settings)[0 if verdict else 1]
        axes.plot(ratios, OBJECTIVES[name](_inputs(ratios, verdict, weight), ratios.log(), settings).coefficient, style,
                  color=colour, label=label, linewidth=2)  # fmt: skip
    axes.axvline(1.0, color=GREY, linewidth=0.8)
    axes.set(title=title, xlabel="R = π_θ / π_old of the token")
    axes.legend(loc="best")


def _inputs(ratios: torch.Tensor, verdict: float, weight: float) -> Inputs:
    def every(value: float) -> torch.Tensor:
        return torch.full_like(ratios, value)

    ones, index = every(1.0), torch.zeros(len(ratios), dtype=torch.int64)
    return Inputs(ratios.log(), every(0.0), every(verdict), every(RATE), every(weight), ones, ones, ones, index)


if __name__ == "__main__":
    main()

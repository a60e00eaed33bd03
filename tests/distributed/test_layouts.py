"""The same mini-batches give the same losses, gradients and parameters under every layout.

A table of cases; those of one world size share a launch. Every case runs in float32 and, where the model allows it, in float64.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megatron_nft.policy import versions
from tests.distributed.reference import logprobs_of, two_updates
from tests.support import LLAMA3_ROPE, made_up_groups, run_ranks, tiny_model

WORKER = Path(__file__).with_name("layout_worker.py")
# adam_eps 1 and lr 1: the first update is -g / (|g| + 1), so parameters differ by what gradients differ, near-zero ones included
CONFIG = """
run_dir: unused
model: {path: unset}
train: {prompts_per_update: 2, tokens_per_micro_batch: 64}
rollout: {n: 4, prompts_per_step: 4}
objective: {reduction_constant: 100.0}
optimizer: {lr: 1.0, adam_eps: 1.0, clip_grad: 1.0, weight_decay: 0.01}
"""
MODELS = {
    "tied": {"tie": True},
    "untied": {"tie": False},
    "qwen3": {"family": "qwen3", "tie": False},
    "experts": {"family": "qwen3_moe", "tie": False},
    "llama": {"family": "llama", "tie": False, **LLAMA3_ROPE},
    "mistral": {"family": "mistral", "tie": False},
}


@dataclass
class Case:
    """A layout, and the case of one rank that it must equal."""

    ranks: int
    overrides: list[str]
    model: str = "untied"
    reference: str = ""  # what follows the model's name in the reference's
    worker: dict = field(default_factory=dict)  # further arguments of the worker

    @property
    def precisions(self) -> list[str]:
        """Megatron's router has its softmax in float32, so that of experts float64 is none. What four ranks cut is cut in float64 by two or
        eight."""
        alone = self.model == "experts" or OVERLAP in self.overrides or {"save", "load"} & self.worker.keys() or self.ranks == 4
        return ["float32"] if alone else ["float32", "float64"]


OVERLAP = "parallel.overlap_grad_reduce=true"
TP, PP, CP, VPP, EP, ETP = (
    f"parallel.{name}="
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    )
)
TP2, PP2, CP2, VPP2, EP2 = (size + "2" for size in (TP, PP, CP, VPP, EP))
SP, SMALL = "parallel.sequence_parallel=true", "train.tokens_per_micro_batch=36"
GEOMETRIC = ["objective.name=gspo", "objective.clip_ratio_low=0.5", "objective.clip_ratio_high=0.5"]
FEW = {"groups": {"prompts": 2, "n": 2}}  # two answers a mini-batch
MASKED = {"groups": {"masked": True}}
ONE_PROMPT = "train.prompts_per_update=1"
CASES = {
    "small micro-batches": Case(1, [SMALL]),
    "one answer a micro-batch": Case(1, [], worker={"padded": True}),
    "recompute": Case(1, ["train.recompute_granularity=full"], "experts"),
    "recompute of two layers": Case(
        1, ["train.recompute_granularity=full", "train.recompute_method=block", "train.recompute_num_layers=2"], "tied"
    ),
    "recompute of attention and MLP": Case(1, ["train.recompute_granularity=selective", "train.recompute_modules=[core_attn, mlp]"]),
    "TP2": Case(2, [TP2]),
    "TP2 SP": Case(2, [TP2, SP], "tied"),
    "PP2": Case(2, [PP2], "tied"),
    "PP2 untied": Case(2, [PP2, SMALL]),
    # the old log-probs are of both mini-batches, whose micro-batches differ in length: a pipeline runs one after the other
    "PP2 short micro-batches": Case(2, [PP2, "train.tokens_per_micro_batch=72"], worker={"length_multiple": 1}),
    "PP2 mistral": Case(2, [PP2], "mistral"),
    "PP2 VPP2": Case(2, [PP2, VPP2], "tied"),
    "CP2": Case(2, [CP2]),
    "CP2 llama": Case(2, [CP2], "llama"),
    "CP2 one ratio an answer": Case(2, [CP2, *GEOMETRIC], reference=" geometric"),
    "CP2 masked": Case(2, [CP2], reference=" masked", worker=MASKED),
    "DP2": Case(2, []),
    # what a GPU does: the reduction starts within the backward pass of the last micro-batch, of which updates have unequally many
    "DP2 overlapped": Case(2, [SMALL, OVERLAP]),
    "DP2 overlapped both": Case(2, [SMALL, OVERLAP, "parallel.overlap_param_gather=true"]),
    "EP2": Case(2, [EP2], "experts"),
    "TP2 SP EP2 ETP1": Case(2, [TP2, SP, EP2, ETP + "1"], "experts"),
    "TP2 SP experts": Case(2, [TP2, SP], "experts"),
    "TP2 PP2": Case(4, [TP2, PP2]),
    "TP2 PP2 llama": Case(4, [TP2, PP2], "llama"),
    "TP2 SP PP2 mistral": Case(4, [TP2, SP, PP2], "mistral"),
    "TP2 SP CP2": Case(4, [TP2, SP, CP2], "tied"),
    "PP2 DP2 small": Case(4, [PP2, SMALL], "tied"),
    "PP2 CP2": Case(4, [PP2, CP2], "tied"),
    "CP2 DP2": Case(4, [CP2]),
    "TP2 PP2 one ratio an answer, masked": Case(4, [TP2, PP2, *GEOMETRIC], reference=" geometric masked", worker=MASKED),
    "CP4": Case(4, [CP + "4"]),
    "CP2 DP2 one answer a micro-batch": Case(4, [CP2], worker={"padded": True}),
    "PP2 VPP2 TP2 SP qwen3": Case(4, [PP2, VPP2, TP2, SP], "qwen3"),
    "DP4, two of them idle": Case(4, [ONE_PROMPT], reference=" few", worker=FEW),
    "EP2 TP2 SP": Case(4, [EP2, TP2, SP], "experts"),
    "EP2 PP2 VPP2": Case(4, [EP2, PP2, VPP2], "experts"),
    "EP2 CP2 DP2": Case(4, [EP2, CP2], "experts"),
    "TP2 PP2 DP2": Case(8, [TP2, PP2], "tied"),
    "TP2 SP PP2 VPP2 CP2": Case(8, [TP2, SP, PP2, VPP2, CP2]),
    "TP2 SP PP2 EP2": Case(8, [TP2, SP, PP2, EP2], "experts"),
}
REFERENCES = {
    **{name: Case(1, [], name) for name in MODELS},
    "untied geometric": Case(1, GEOMETRIC),
    "untied masked": Case(1, [], worker=MASKED),
    "untied geometric masked": Case(1, GEOMETRIC, worker=MASKED),
    "untied few": Case(1, [ONE_PROMPT], worker=FEW),
}

# saved after the first update under one layout, loaded under another for the second
CHECKPOINTS = {
    "saved": Case(4, [EP2, PP2, VPP2], "experts", worker={"save": "step_1"}),
    "loaded": Case(4, [EP2, TP2, SP, CP2, ETP + "1"], "experts", worker={"load": "step_1"}),
    # gradient buckets that are not full: Megatron-Core pads them at their ends
    "saved of buckets": Case(1, [OVERLAP, "megatron.ddp.bucket_size=5000"], worker={"save": "buckets"}),
    "loaded of buckets": Case(1, [], worker={"load": "buckets"}),
}
ALL = {**REFERENCES, **CASES, **CHECKPOINTS}


class Launches:
    """What the cases of a world size gave, run when the first of them is asked for."""

    def __init__(self, directory: Path, selected: str):
        """selected: the ids of the tests that are to run; a case of more than one rank that none of them names is left out."""
        self._selected = selected
        self.models = {name: tiny_model(directory / name, **settings) for name, settings in MODELS.items()}
        self._directory, self._found = directory, {}

    def __call__(self, name: str, precision: str) -> dict:
        ranks = ALL[name].ranks
        if ranks not in self._found:
            self._found[ranks] = None  # a launch that failed is not repeated
            self._found[ranks] = self._launch(ranks)
        assert self._found[ranks], f"the launch of {ranks} ranks failed: see the first of its cases"
        return self._found[ranks][f"{name} {precision}"]

    def _launch(self, ranks: int) -> dict:
        wanted = [(name, case, precision) for name, case in ALL.items() if case.ranks == ranks for precision in case.precisions]
        cases = [self._arguments(*one) for one in wanted if self._is_selected(*one)]
        file, output = self._directory / "config.yaml", self._directory / f"{ranks}.pt"
        file.write_text(CONFIG)
        run_ranks(WORKER, ranks, {"config": str(file), "cases": cases, "output": str(output)}, self._directory)
        found = torch.load(output)
        assert found.pop("megatron") == versions.version()  # ranks run the Megatron-Core that this process would
        return found

    def _is_selected(self, name: str, case: Case, precision: str) -> bool:
        return (
            case.ranks == 1
            or name in CHECKPOINTS
            or f"[{name}-{precision}-" in self._selected
            or (precision == "float32" and f"[{name}]" in self._selected)
        )

    def _arguments(self, name: str, case: Case, precision: str) -> dict:
        model = str(self.models[case.model])
        given = {"name": f"{name} {precision}", "model": model, "overrides": case.overrides, "float64": precision == "float64"}
        return given | case.worker


@pytest.fixture(scope="module")
def launches(request, tmp_path_factory) -> Launches:
    return Launches(tmp_path_factory.mktemp("layouts"), " ".join(item.nodeid for item in request.session.items))


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """|mine - theirs| / |theirs|"""
    return ((mine - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, id=f"{name}-{precision}-{case.ranks}ranks")
        for name, case in CASES.items()
        for precision in case.precisions
    ],
)
def test_equals_one_rank(name, precision, launches):
    """Losses, metrics and every tensor's gradient to 1e-5 relative (float64: 1e-9), parameters to 2e-6."""
    case, tolerance = CASES[name], {"float32": 1e-5, "float64": 1e-9}[precision]
    got, single = launches(name, precision), launches(case.model + case.reference, precision)
    for key, tensor in single["before"].items():
        assert torch.equal(got["before"][key], tensor), key
    for mine, theirs in zip(got["updates"], single["updates"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-7 if precision == "float32" else 1e-12)
    for mine, theirs in zip(got["gradients"], single["gradients"], strict=True):
        assert mine.keys() == theirs.keys() == single["before"].keys()
        for key, gradient in theirs.items():
            assert gradient.norm() > 1e-6 and apart(mine[key], gradient) < tolerance, (key, apart(mine[key], gradient))
    if precision == "float32":
        assert got["old"] == pytest.approx(single["old"], rel=1e-5)
        for key, tensor in single["after"].items():
            assert not torch.equal(tensor, single["before"][key]), f"{key} was not trained"
            torch.testing.assert_close(got["after"][key], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_the_coefficients_are_those_of_one_rank(name, launches):
    """R and c of seven answers' tokens, to 1e-4: whichever ranks had them, the first has them in order."""
    case = CASES[name]
    got, single = launches(name, "float32")["pushes"], launches(case.model + case.reference, "float32")["pushes"]
    assert len(got) == min(7, 4 if "few" in case.reference else 16)
    for mine, theirs in zip(got, single, strict=True):
        assert mine[:2] == theirs[:2]
        for one, other in zip(mine[2:], theirs[2:], strict=True):
            assert [value is None for value in one] == [value is None for value in other]
            assert [value for value in one if value is not None] == pytest.approx([v for v in other if v is not None], rel=1e-4, abs=1e-6)
    trained = [c for one in single for c in one[3] if c is not None]
    assert trained and any(trained) and all(value is None for one in got for value in one[3][1::3]) == ("masked" in name)


@pytest.mark.parametrize("name", ["DP4, two of them idle"])
def test_some_ranks_were_idle(name, launches):
    """The case is what its name says: two answers over four replicas."""
    assert [sorted(n) for n in zip(*launches(name, "float32")["answers"])] == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("name", ["PP2 short micro-batches"])
def test_micro_batches_were_of_unequal_lengths(name, launches):
    """The case is what its name says."""
    first, second = launches(name, "float32")["slots"]
    assert first != second


@pytest.mark.parametrize("pair", ["", " of buckets"])
def test_a_checkpoint_goes_on_under_another_layout(pair, launches):
    """Weights, moments and step counts: the second update is the same (1e-5 relative), and so are the parameters after it (2e-6)."""
    saved, loaded = launches(f"saved{pair}", "float32"), launches(f"loaded{pair}", "float32")
    assert loaded["updates"][0] == pytest.approx(saved["updates"][1], rel=1e-5, abs=1e-7)
    for key, tensor in saved["after"].items():
        torch.testing.assert_close(loaded["after"][key], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("model", MODELS)
def test_one_rank_equals_transformers_in_float64(model, launches):
    """Loss and gradient norm to 2e-5 relative, parameters to 5e-6: what float32 loses in four layers and two updates."""
    single, expected = launches(model, "float32"), two_updates(launches.models[model], made_up_groups())
    for mine, theirs in zip(single["updates"], expected["updates"], strict=True):
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
    assert abs(expected["updates"][1]["loss"]) > 1e-3  # off-policy by then: the loss has a value
    assert single["before"].keys() == expected["before"].keys()
    for key, value in expected["after"].items():
        torch.testing.assert_close(single["before"][key].double(), expected["before"][key], rtol=0, atol=0)
        torch.testing.assert_close(single["after"][key].double(), value, rtol=1e-5, atol=5e-6, msg=lambda m, n=key: f"{n}: {m}")


@pytest.fixture(scope="module")
def by_transformers(launches):
    """(model, how the made-up groups are) -> log-probs by number of the answer."""

    @functools.cache
    def of(model: str, groups: tuple) -> dict[int, torch.Tensor]:
        return logprobs_of(launches.models[model], made_up_groups(**dict(groups)))

    return of


@pytest.mark.parametrize("name", [name for name in [*REFERENCES, *CASES] if "masked" not in name])
def test_logprobs_equal_transformers(name, launches, by_transformers):
    """Float32, to 2e-5: sums in another order. Of every answer, whichever rank had it; and of whole sequences, on the first rank."""
    case = ALL[name]
    found, whole = (launches(name, "float32")[key] for key in ("logprobs", "whole"))
    expected = by_transformers(case.model, tuple(case.worker.get("groups", {}).items()))
    assert found.keys() == expected.keys()
    for number, values in expected.items():
        torch.testing.assert_close(found[number], values, rtol=0, atol=2e-5)
        torch.testing.assert_close(torch.tensor(whole[number][-len(values) :]), values, rtol=0, atol=2e-5)

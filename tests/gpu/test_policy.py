"""The policy's kernels against transformers in float64 and against each other: Transformer Engine's layers and the local ones, FP8,
packing, the optimizer, the journey to the host, determinism.

The gradients' tolerances are relative, |mine - other| / |other| of each tensor. Of the same model in plain PyTorch on a CPU, bf16's largest
is 0.032 (log-probs 0.06 at most), and FP8's 0.3, a cosine of 0.956 (log-probs 0.07 in the mean, 0.28 at most), when operands are rounded to
e4m3 and gradients to e5m2; each tolerance is two to three times that.
"""

import pytest
import torch

from tests.distributed.reference import gradients, logprobs_of
from tests.gpu.cases import GPU, TE
from tests.gpu.marks import needs_gpu, needs_te
from tests.support import made_up_groups

LOGPROBS = {"fp32": 1e-4, "bf16": 0.15, "fp16": 0.02}  # at most, in nats
GRADIENTS = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
FP8_MEAN, FP8_MOST, FP8_COSINE, FP8_NORM = 0.15, 0.75, 0.9, 0.1
RECIPES = ["tensorwise", "delayed", "blockwise"]


@pytest.fixture(scope="session")
def expected(model) -> dict:
    """By transformers in float64: log-probs of every answer, gradients of both mini-batches at the model's own weights."""
    groups = made_up_groups()
    return {"logprobs": logprobs_of(model, groups, torch.float64), "gradients": gradients(model, groups)}


@pytest.fixture
def case(policy_cases):
    """Name of a case -> what it found; fails with the error that the case ended in."""

    def of(name: str) -> dict:
        found = policy_cases[name]
        if "error" in found:
            pytest.fail(f"{name}:\n{found['error']}", pytrace=False)
        return found

    return of


def logprob_errors(mine: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> torch.Tensor:
    assert mine.keys() == theirs.keys()
    return torch.cat([(mine[number].double() - theirs[number].double()).abs() for number in theirs])


def gradient_errors(mine: dict, theirs: dict) -> dict[str, float]:
    """|mine - theirs| / |theirs| of every tensor, by its Hugging Face name."""
    assert mine.keys() == theirs.keys()
    return {name: ((mine[name].double() - its.double()).norm() / its.double().norm()).item() for name, its in theirs.items()}


def cosines(mine: dict, theirs: dict) -> dict[str, float]:
    assert mine.keys() == theirs.keys()
    return {name: torch.cosine_similarity(mine[name].flatten().double(), its.flatten().double(), 0).item() for name, its in theirs.items()}


def norm(found: dict) -> float:
    return sum(one.double().norm() ** 2 for one in found.values()).sqrt().item()


def close(one: dict, logprobs: dict, grads: list[dict], precision: str, figures, **more) -> None:
    """Log-probs and the gradients of both mini-batches within the precision's tolerances."""
    errors = logprob_errors(one["logprobs"], logprobs)
    apart = [gradient_errors(mine, theirs) for mine, theirs in zip(one["gradients"], grads)]
    worst, name = max((error, name) for found in apart for name, error in found.items())
    figures(f"log-probs {LOGPROBS[precision]}, gradients {GRADIENTS[precision]}", logprobs_mean=errors.mean().item(),
            logprobs_max=errors.max().item(), gradients_max=worst, worst=name, **more)  # fmt: skip
    assert errors.max() < LOGPROBS[precision]
    assert worst < GRADIENTS[precision], name


KERNELS = [
    pytest.param("fp32", id="fp32-local"),  # Transformer Engine's attention over packed sequences knows no float32
    pytest.param("bf16 local", id="bf16-local"),
    pytest.param("bf16 TE", id="bf16-TE", marks=needs_te),
    pytest.param("fp16 local", id="fp16-local", marks=needs_gpu),
    pytest.param("fp16 TE", id="fp16-TE", marks=needs_te),
]


@pytest.mark.parametrize("name", KERNELS)
def test_equals_transformers_in_float64(name, case, expected, figures):
    """Log-probs of packed answers: float32 1e-4, bf16 0.15, fp16 0.02 at most; gradients of every tensor in both mini-batches: 1e-4, 0.1,
    0.02. The kernels are those that the name says."""
    one = case(name)
    close(one, expected["logprobs"], expected["gradients"], name.split()[0], figures, attention=one["attention"] * ("TE" in name))
    assert ("Transformer Engine layers" in one["kernels"]) == ("TE" in name)
    assert all(update["grad_norm"] == pytest.approx(norm(kept), rel=1e-3) for update, kept in zip(one["updates"], one["gradients"]))


@needs_te
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_transformer_engine_equals_the_local_layers(precision, case, figures):
    """To what both may be from float64 (above)."""
    local = case(f"{precision} local")
    close(case(f"{precision} TE"), local["logprobs"], local["gradients"], precision, figures)


@pytest.mark.parametrize("name", ["fp32", "bf16 local", pytest.param("bf16 TE", marks=needs_te)])
def test_packed_equals_one_at_a_time(name, case, figures):
    """Several answers a micro-batch against one: float32 1e-4 (log-probs and gradients); bf16 as from float64 (above), for sums of
    gradients over other micro-batches, and kernels for other shapes, round elsewhere."""
    packed, alone = case(name), case(f"{name} alone")
    assert min(packed["sequences"]) > 2 and max(alone["sequences"]) <= 1
    close(packed, alone["logprobs"], alone["gradients"], name.split()[0], figures)


@pytest.mark.parametrize("name", ["fp32 deterministic", "bf16 local deterministic", pytest.param("bf16 TE deterministic", marks=needs_te)])
def test_asked_for_the_same_bits_an_update_gives_them(name, case, figures):
    """megatron.transformer.deterministic_mode: the gradients of a mini-batch, made twice, to the last bit."""
    one, without = case(name), case(name.removesuffix(" deterministic"))
    differ, plain = ([key for key in found[0] if not torch.equal(found[0][key], found[2][key])]
                     for found in (one["gradients"], without["gradients"]))  # fmt: skip
    figures("0", tensors_that_differ=len(differ), without_asking=len(plain), attention=one["attention"] * ("TE" in name))
    assert all(one["deterministic"]) and not any(without["deterministic"])
    assert differ == []


@needs_te
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_against_bf16(recipe, case, figures):
    """e4m3 forward and e5m2 back: log-probs 0.15 in the mean and 0.75 at most, gradient norms 10 %, every tensor's gradient a cosine of
    0.9. Of the second time that a mini-batch is seen, for the delayed recipe goes by what it saw before."""
    fp8, bf16 = case(recipe), case("bf16 TE")
    errors, similar = logprob_errors(fp8["logprobs"], bf16["logprobs"]), cosines(fp8["gradients"][2], bf16["gradients"][2])
    least, worst = min((value, name) for name, value in similar.items())
    ratio = norm(fp8["gradients"][2]) / norm(bf16["gradients"][2])
    figures(f"log-probs mean {FP8_MEAN}, max {FP8_MOST}; cosine {FP8_COSINE}, norm {FP8_NORM}", logprobs_mean=errors.mean().item(),
            logprobs_max=errors.max().item(), norm_ratio=ratio, cosine_min=least, worst=worst,
            cosine_mean=sum(similar.values()) / len(similar), attention=fp8["attention"])  # fmt: skip
    assert f"FP8 (hybrid, {recipe})" in fp8["kernels"]
    assert 1e-4 < errors.mean() < FP8_MEAN and errors.max() < FP8_MOST  # and it was FP8
    assert abs(ratio - 1) < FP8_NORM and least > FP8_COSINE, worst


@needs_te
def test_parameters_kept_in_fp8(case, figures):
    """They start from the unrounded ones and train: against bf16, as FP8 from parameters in bf16 (above)."""
    fp8, bf16 = case("tensorwise, kept in FP8"), case("bf16 TE")
    errors, similar = logprob_errors(fp8["logprobs"], bf16["logprobs"]), cosines(fp8["gradients"][2], bf16["gradients"][2])
    figures(f"log-probs mean {FP8_MEAN}, cosine {FP8_COSINE}", logprobs_mean=errors.mean().item(), cosine_min=min(similar.values()))
    assert 1e-4 < errors.mean() < FP8_MEAN and min(similar.values()) > FP8_COSINE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_by_the_distributed_optimizer(precision, case, figures):
    """Five, of gradients of four sizes, the large ones clipped: its float32 weights against torch's AdamW in float64, to 1e-5; norms to
    1e-5; the model's weights are these, rounded to its precision. On a GPU the kernel is Transformer Engine's FusedAdam."""
    found = case(f"{precision} adam")
    error = max((found["mine"][name].double() - theirs).abs().max().item() for name, theirs in found["theirs"].items())
    norms = max(abs(mine / theirs - 1) for mine, theirs in found["norms"])
    figures("1e-5", weights=error, norms=norms, adam=found["adam"] or "torch")
    assert found["norms"][0][1] < 1 < found["norms"][-1][1] and error < 1e-5 and norms < 1e-5
    assert all(torch.equal(values, found["mine"][name].to(values.dtype)) for name, values in found["weights"].items())
    assert found["adam"] == ("Transformer Engine" if TE else None)


@pytest.mark.parametrize("name", ["fp32", "bf16 local", pytest.param("bf16 TE", marks=needs_te)])
def test_the_state_leaves_the_device_and_comes_back_bit_for_bit(name, case, figures):
    """Nothing of it stays, every byte is what it was, and a GPU has all of its memory back."""
    journey = case(name)["journey"]
    figures("0 left, same bytes", bytes=journey["bytes"], left=journey["left"], freed=journey["freed"])
    assert journey["left"] == 0 and journey["bytes"] > 0 and all(journey["same"].values())
    assert journey["freed"] >= journey["bytes"] or not GPU

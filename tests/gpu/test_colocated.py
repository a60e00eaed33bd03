"""vLLM in the process of the trainer, on one GPU or on none: weights, log-probs, sleep, CUDA graphs, memory."""

import pytest

from tests.gpu.cases import GPU
from tests.gpu.colocated import CACHE, ROUNDS
from tests.gpu.marks import gpu_or_long, needs_gpu, needs_vllm

pytestmark = [needs_vllm, gpu_or_long]  # on a CPU see tests/end_to_end/test_parity.py and test_selfcheck.py
MIB = 2**20
LOOKS = ("first sync", "sync after an update", "last round")


@pytest.mark.parametrize("when", LOOKS)
def test_the_sampler_has_the_trainers_weights(when, colocated_bf16, figures):
    """After our stream into vLLM's own reload, also after sleep level 2 and updates: every tensor bit for bit, a tolerance of 0 (where vLLM
    packs a tensor, by its product with a fixed vector)."""
    wrong = colocated_bf16["weights"][when]
    figures("0", tensors_that_differ=len(wrong))
    assert wrong == []


@pytest.mark.parametrize("when", LOOKS)
def test_logprobs_of_trainer_and_sampler(when, colocated_bf16, figures):
    """Of sampled tokens, at temperature 1. In bf16 both round in each of four layers: 0.1 in the mean and 1 at most; in float32 they sum in
    another order: 1e-4 at most."""
    found = colocated_bf16["parity"][when]
    mean, most = (0.1, 1.0) if GPU else (1e-4, 1e-4)
    figures(f"mean {mean}, max {most}", **found)
    assert found["tokens"] > 100 and found["mean"] < mean and found["max"] < most and found["rescored"] < most


@needs_gpu
def test_logprobs_with_a_sampler_in_fp8(colocated_fp8, figures):
    """Weights quantised at every sync, activations as they come, e4m3's 3 bits of mantissa in each layer: 0.25 in the mean and 2.5 at most;
    tensors by their product with a fixed vector, to 20 %."""
    found, wrong = colocated_fp8["parity"], [name for names in colocated_fp8["weights"].values() for name in names]
    figures("mean 0.25, max 2.5, no tensor", tensors_that_differ=len(wrong), graphs=colocated_fp8["graphs"]["replayed"],
            **{f"{name} ({when})": value for when, of in found.items() for name, value in of.items()})  # fmt: skip
    assert wrong == []
    assert all(of["mean"] < 0.25 and of["max"] < 2.5 for of in found.values())
    assert all(of["mean"] > 1e-3 for of in found.values())  # it was FP8


def test_sleep_level_1_keeps_the_weights(colocated_bf16, figures):
    """Checksums and greedy answers the same after waking; the answers' log-probs to 1e-3, the same kernels on the same batch."""
    found = colocated_bf16["sleep"]
    figures("same weights and tokens, log-probs 1e-3", logprobs=found["apart"])
    assert found["weights"] and found["tokens"] and found["apart"] < 1e-3


@needs_gpu
def test_cuda_graphs_are_captured_and_used(colocated_bf16, figures):
    """Graphs are there after the start, and answers replay them: at least one a token of the longest answer."""
    found = colocated_bf16["graphs"]
    figures("captured > 0, replayed >= 40", **found)
    assert found["mode"] != "NONE" and found["captured"] > 0 and found["replayed"] >= 40


@needs_gpu
def test_sleep_gives_the_cache_back(colocated_bf16, figures):
    """Of the device, at least 95 % of the key-value cache's bytes, in each round."""
    freed = [one["awake"]["used"] - one["asleep"]["used"] for one in colocated_bf16["rounds"]]
    figures("at least 0.95 x the cache", least_freed_mib=min(freed) / MIB, cache_mib=CACHE / MIB)
    assert min(freed) > 0.95 * CACHE


@needs_gpu
@pytest.mark.parametrize(("at", "kind", "tolerance"), [("rested", "allocated", 1), ("asleep", "allocated", 1), ("asleep", "used", 128)])
def test_memory_after_ten_rounds_is_that_after_the_first(at, kind, tolerance, colocated_bf16, figures):
    """torch's tensors to 1 MiB; the whole device while vLLM sleeps to 128 MiB, for kernels that a new shape is the first to load stay on
    it. Weights left behind would be 90 MiB a round, gradients 180."""
    rounds = [one[at][kind] / MIB for one in colocated_bf16["rounds"]]
    figures(f"{tolerance} MiB", first_mib=rounds[0], last_mib=rounds[-1], most_mib=max(rounds), rounds=len(rounds))
    assert len(rounds) == ROUNDS and abs(rounds[-1] - rounds[0]) <= tolerance


def test_no_gradients_while_the_sampler_works(colocated_bf16, figures):
    """Their storages have no bytes in any round."""
    left = [one["gradients"] for one in colocated_bf16["rounds"]]
    figures("0", bytes_left=max(left))
    assert left == [0] * ROUNDS


@pytest.mark.parametrize("found", ["colocated_bf16", pytest.param("colocated_fp8", marks=needs_gpu)])
def test_engine_and_trainer_end_well(found, request):
    """The process closes the engine, ends torch.distributed and exits with 0."""
    assert request.getfixturevalue(found)["end"] == ""

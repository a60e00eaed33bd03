"""The planner's verdict, and what keeps no run from its start."""

from types import SimpleNamespace

import pytest

from megatron_nft.config import load
from megatron_nft.errors import UserError
from megatron_nft.preflight import planned
from megatron_nft.preflight.planned import check_fits, known
from tests.support import ROOT

H100 = ["NVIDIA H100 80GB HBM3"] * 8


def settings(*overrides: str, example: str = "qwen2.5_32b/nft"):
    return load(ROOT / f"examples/{example}.yaml", ["model.path=models/Qwen2.5-32B", *overrides])


def test_a_config_without_nodes_is_not_planned():
    assert check_fits(settings("plan.nodes=null"), H100) == ""


def test_what_fits_and_what_does_not():
    assert check_fits(settings(), H100) == "fits, as the planner estimates"
    with pytest.raises(UserError, match=r" needs .*, as the planner estimates: .*--search names .*; plan.nodes=null goes on without"):
        check_fits(settings("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"), H100)


def test_the_plan_is_for_the_gpus_that_are_there(monkeypatch):
    """Whatever plan.gpu says: here what an H100 has not the memory for."""
    large = settings("rollout.gpu_memory_utilization=0.97")
    with pytest.raises(UserError, match="--search"):
        check_fits(large, H100)
    seen = []
    monkeypatch.setattr(planned, "plan", lambda config: seen.append(config.plan.gpu) or SimpleNamespace(fits=True))
    assert check_fits(large, ["NVIDIA H200"]) == "fits on H200, which is what is here (plan.gpu: H100), as the planner estimates"
    assert seen == ["H200"] and large.plan.gpu == "H100"


@pytest.mark.parametrize(
    ("seen", "name"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA B200", "B200"),
     ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA GH200 480GB", None), ("NVIDIA L40S", None)],
)  # fmt: skip
def test_names_of_gpus(seen, name):
    assert known(seen) == name


def test_gpus_that_the_planner_does_not_know():
    assert check_fits(settings(), ["NVIDIA L40S"] * 8) == "no plan: the planner does not know NVIDIA L40S"


def test_what_the_planner_cannot_reckon_with(monkeypatch):
    uneven = "megatron.transformer={num_layers_in_first_pipeline_stage: 8}"
    assert check_fits(settings(uneven), H100).startswith("no plan: megatron.transformer.num_layers_in_first_pipeline_stage is set")

    def broken(config):
        raise KeyError("rope_theta")

    monkeypatch.setattr(planned, "plan", broken)
    assert check_fits(settings(), H100) == "no plan: KeyError ('rope_theta')"

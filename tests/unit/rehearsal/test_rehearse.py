"""The whole rehearsal in a small world: Megatron's own ranks and shapes, and the planner's numbers beside it."""

import pytest

from megatron_nft import config
from megatron_nft.planner.parameters import total
from megatron_nft.planner.plan import plan
from megatron_nft.policy import absent
from megatron_nft.rehearsal import rehearse
from megatron_nft.rehearsal.batches import batch, plain_sum
from megatron_nft.weights import table_for

CONFIG = """
run_dir: run
preset: nft-7b
model: {path: Qwen2.5-1.5B}
plan: {nodes: 1}
parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}
rollout: {prompts_per_step: 8, n: 4, tensor_parallel_size: 2, max_tokens: 512}
train: {prompts_per_update: 4, tokens_per_micro_batch: 1024}
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("rehearsal") / "config.yaml"
    file.write_text(CONFIG)
    return rehearse(plan(config.load(file)))


def test_ranks_are_where_megatron_puts_them(found):
    """Tensor-parallel ranks adjacent, then data, pipeline stages outermost; engines in order of ranks."""
    assert [(r.tp, r.dp, r.pp, r.engine, r.engine_tp) for r in found.ranks] == [
        (rank % 2, rank // 2 % 2, rank // 4, rank // 2, rank % 2) for rank in range(8)
    ]
    assert found.crossing == []


def test_groups_over_two_nodes_are_told(found):
    from megatron_nft.rehearsal.ranks import crossing, rank_map

    settings, cluster = found.plan.config, found.plan.cluster.__class__(found.plan.cluster.gpu, 8, 1, 8, 4)
    places = absent.places(settings.parallel, 8)
    assert crossing(rank_map(settings, cluster, places), settings) == ["4 of 4 tensor groups cross nodes", "4 of 4 vLLM groups cross nodes"]


def test_stages_together_hold_the_model(found):
    """What Megatron writes and what it sends is the model, each weight once."""
    hf = found.plan.hf
    assert found.written.parameters == total(hf)
    assert sum(found.written.files.values()) == 14 * total(hf)
    assert set(found.written.files) == {0, 1, 4, 5}  # of the first replica
    assert found.streamed.nbytes >= 2 * total(hf)
    assert found.streamed.nbytes - 2 * total(hf) < 512 * len(table_for(hf).hf_shapes())  # rounded up to where a tensor may begin


def test_planner_and_rehearsal_agree_where_both_count(found):
    same = {"parameters of the fullest rank", "bytes synced", "checkpoint, bytes", "micro-batches of an update"}
    rows = {one.name: one.difference for one in found.compared}
    assert {name for name in same if rows[name] == 0} == same
    assert abs(rows["train, seconds"]) < 0.2


def test_denominators_and_packing(found):
    own = found.batched
    assert own.same and own.denominators < 1e-6
    assert len(own.counts) == 2 and all(count % 2 == 0 for count in own.counts)  # interleaved: a multiple of the stages
    assert own.bubble == pytest.approx(sum(1 / (2 * count + 1) for count in own.counts) / 2)
    assert 0.5 < own.fill <= 1 <= own.balance


@pytest.mark.parametrize("overrides", [{"reduction": "token-mean"}, {"reduction": "sequence-mean"}, {"ratio": "sequence"},
                                       {"ratio": "sequence", "reduction": "token-mean"}])  # fmt: skip
def test_plain_sums_of_every_reduction(found, overrides):
    settings = config.ObjectiveConfig(**overrides)
    other = config.Config(run_dir="run", model=found.plan.config.model, objective=settings)
    assert plain_sum(other, found.batched.answers.loss_tokens) > 0
    again = batch(other, found.sampled.groups, found.batched.plan.layout, 1, 1)
    assert again.denominators < 1e-6


def test_text_and_numbers(found):
    text = found.text()
    for part in ("rank map", "queue: ", "packing: ", "weight stream", "written by ranks 0, 1, 4, 5", "difference\ngroups sent"):
        assert part in text
    assert len(found.as_dict()["ranks"]) == 8

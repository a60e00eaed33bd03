"""The search: against trying everything, one by one; what it says; the nearest mend."""

import itertools

import pytest

from megatron_nft import config
from megatron_nft.errors import UserError
from megatron_nft.planner import search
from megatron_nft.planner.plan import plan


@pytest.fixture
def small(file, simple):
    """One node, and the 1.5B model: few layouts."""
    file.write_text(
        "run_dir: run\npreset: nft-7b\nmodel: {path: Qwen2.5-1.5B}\nplan: {nodes: 1}\nrollout: {tensor_parallel_size: 2}\n"
        "parallel: {tensor_model_parallel_size: 2, sequence_parallel: true}\ntrain: {tokens_per_micro_batch: 4096}\n"
    )
    return lambda *overrides: plan(config.load(file, list(overrides)))


def everything(file) -> dict[tuple, float]:
    """Seconds of the fastest setting of each TP x PP x CP, by loading every config there is."""
    best: dict[tuple, float] = {}
    given = config.load(file)
    # in the simple model offloading and a larger share only add room: the search has to find that out
    offload, share = "all", 0.85
    sizes = itertools.product((1, 2), (1, 2, 4), (1, 2, 4, 8), (None, 2, 4), (4096, 8192, 16384), (None, "selective", "full"), (1, 2))
    for tp, pp, cp, vpp, tokens, recompute, engine in sizes:
        if 8 % (tp * pp * cp) or vpp and (pp == 1 or 28 % (pp * vpp)):
            continue
        changes = {"parallel.tensor_model_parallel_size": tp, "parallel.pipeline_model_parallel_size": pp,
                   "parallel.context_parallel_size": cp, "parallel.virtual_pipeline_model_parallel_size": vpp,
                   "parallel.sequence_parallel": tp > 1, "train.tokens_per_micro_batch": tokens, "train.recompute_granularity": recompute,
                   "rollout.tensor_parallel_size": engine, "train.offload": offload, "rollout.gpu_memory_utilization": share}  # fmt: skip
        found = plan(search.changed(given, changes))
        if found.fits:
            best[tp, pp, cp] = min(best.get((tp, pp, cp), 1e9), found.times.step)
    return best


def test_finds_the_fastest_of_all(small, file):
    given = small()
    best = sorted(everything(file).items(), key=lambda item: item[1])
    found = search.search(given, 3)
    assert found[0].plan.times.step == pytest.approx(best[0][1])
    assert search._shape(found[0].plan) == best[0][0]
    steps = [one.plan.times.step for one in found]
    assert steps == sorted(steps) and all(one.plan.fits for one in found)


def test_overrides_give_the_plan_that_was_found(small, file):
    for one in search.search(small(), 3):
        again = plan(config.load(file, one.overrides.split()))
        assert again.times.step == pytest.approx(one.plan.times.step) and again.memory.phases == one.plan.memory.phases


def test_only_layouts_that_suit_model_and_cluster(planned):
    given = planned()
    for tp, pp, cp, vpp in search._shapes(given):
        assert 8 % tp == 0 and 40 % tp == 0 and 64 % (pp * (vpp or 1)) == 0 and 128 % (tp * pp * cp) == 0
        for tokens in search._token_counts(given.config, tp, cp):
            changes = search._training_change(given.config, tp, pp, cp, vpp, tokens, None)
            assert changes["parallel.sequence_parallel"] == (tp > 1)
            assert tokens >= 16384 and tokens % (tp * cp) == 0 and tokens % (2 * cp) == 0


def test_says_why(small):
    given = small()
    best = search.search(given, 1)[0]
    tokens = best.plan.memory.kv_tokens * best.plan.cluster.engines
    assert f"more KV cache: {tokens:,} tokens in flight" in best.why
    assert best.overrides in search.table(given, [best])


def test_a_mend_fits(planned, file):
    given = planned("train.tokens_per_micro_batch=65536")
    said = search.mend(given)
    overrides = said.removeprefix("set ").split(", which fits")[0].split()
    assert plan(config.load(file, ["train.tokens_per_micro_batch=65536", *overrides])).fits


def test_nothing_fits_on_one_node(planned):
    given = planned("plan.nodes=1")
    assert not given.fits
    if not search.search(given, 1):
        assert search.mend(given).startswith("no layout was found")


def test_changed_refuses_what_the_config_refuses(planned):
    with pytest.raises(UserError):
        search.changed(planned().config, {"train.recompute_granularity": None, "train.recompute_method": "uniform"})

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import answers_of, reasoning_lengths
from megatron_nft.batching import Answers, Layout, TrainingAnswer, join, pack, plan, split
from megatron_nft.errors import UserError


def made_answers(prompts, responses, loss_tokens, verdicts, n) -> Answers:
    """Groups of n answers without penalties."""
    return Answers(prompts, responses, loss_tokens, verdicts, np.zeros(len(verdicts)), np.arange(len(verdicts)) // n)


def make_answers(groups=6, n=4, seed=0, longest=40) -> Answers:
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(3, 12, groups), n)
    responses = rng.integers(1, longest, groups * n)
    verdicts = rng.integers(0, 2, groups * n).astype(float)
    return made_answers(prompts, responses, responses.copy(), verdicts, n)


def make_plan(answers, data=2, tokens=64, prompts=2, reduction="constant", constant=1000.0, **kwargs):
    return plan(
        answers,
        Layout(data, tokens, prompts),
        weights=lambda verdicts, _: np.full(len(verdicts), 1 - verdicts.mean()),
        reduction=reduction,
        constant=constant,
        **kwargs,
    )


@pytest.mark.parametrize("data", [1, 2, 3, 8])
def test_every_answer_is_placed_once_and_fits(data):
    answers = make_answers()
    made = make_plan(answers, data=data)
    assert [mini.answers for mini in made.mini_batches] == [list(range(start, start + 8)) for start in (0, 8, 16)]
    for mini in made.mini_batches:
        assert len(mini.micro_batches) == data
        assert len({len(batches) for batches in mini.micro_batches}) == 1, "every rank runs equally many micro-batches"
        for batches in mini.micro_batches:
            assert all(sum(answers.lengths[a] for a in batch) <= 64 for batch in batches)


def test_rates_weights_and_scales_do_not_depend_on_the_layout():
    answers = make_answers()
    one, many = make_plan(answers, data=1, tokens=512), make_plan(answers, data=4, tokens=52)
    for name in ("correct_rates", "weights", "scales"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    np.testing.assert_allclose(one.correct_rates[:4], answers.verdicts[:4].mean())
    np.testing.assert_allclose(one.weights, 1 - one.correct_rates)


def test_denominators_are_over_the_whole_mini_batch():
    answers = make_answers()
    tokens = answers.response_lengths
    np.testing.assert_allclose(make_plan(answers, constant=500.0).scales, 1 / 500)
    token_mean = make_plan(answers, reduction="token-mean").scales
    np.testing.assert_allclose(token_mean[:8], 1 / tokens[:8].sum())
    sequence_mean = make_plan(answers, reduction="sequence-mean").scales
    np.testing.assert_allclose(sequence_mean, 1 / (8 * tokens))
    np.testing.assert_allclose(make_plan(answers, reduction="sequence-mean", per_sequence=True).scales, 1 / 8)


@st.composite
def layouts_and_answers(draw) -> tuple[Answers, Layout]:
    """Groups of unequal size, some answers without a trained token, and a layout that holds them."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    lengths = st.lists(st.integers(1, 60), min_size=sum(sizes), max_size=sum(sizes))
    prompts, responses = np.array(draw(lengths)), np.array(draw(lengths))
    trained = responses * np.array(draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    verdicts, groups = np.arange(sum(sizes)) % 2.0, np.repeat(np.arange(len(sizes)), sizes)
    multiple = draw(st.sampled_from([1, 2, 4]))
    layout = Layout(
        data_parallel_size=draw(st.integers(1, 6)),
        tokens_per_micro_batch=draw(st.integers(30, 100)) * 4,
        prompts_per_update=draw(st.integers(1, 5)),
        attention_cost=draw(st.sampled_from([0.0, 1e-3, 1.0])),
        length_multiple=draw(st.sampled_from([None, 1, 6, 8])),
        count_multiple=draw(st.sampled_from([1, 1, 3])),
        sequence_multiple=multiple,
    )
    return Answers(prompts, responses, trained, verdicts, np.zeros(sum(sizes)), groups), layout


def rates(verdicts, _):
    return np.full(len(verdicts), verdicts.mean())


@given(layouts_and_answers())
@settings(max_examples=200, deadline=None)
def test_any_plan_places_every_answer_once_within_the_slots(case):
    answers, layout = case
    made, multiple = plan(answers, layout, rates, "token-mean", 1.0), layout.sequence_multiple
    wanted = [np.flatnonzero(np.isin(answers.groups, g)).tolist() for g in runs_of(answers.groups, layout.prompts_per_update)]
    assert [mini.answers for mini in made.mini_batches] == wanted, "mini-batches are runs of whole groups"
    for mini in made.mini_batches:
        [count] = {len(replica) for replica in mini.micro_batches}
        assert len(mini.micro_batches) == layout.data_parallel_size and count % layout.count_multiple == 0
        used = [sum(math.ceil(n / multiple) * multiple for n in answers.lengths[b]) for replica in mini.micro_batches for b in replica]
        assert max(used) <= mini.slots <= layout.tokens_per_micro_batch and mini.slots % layout.sequence_multiple == 0
        if layout.length_multiple is None:
            assert mini.slots == layout.tokens_per_micro_batch
        else:
            assert mini.slots % layout.length_multiple == 0 or mini.slots == layout.tokens_per_micro_batch
            assert mini.slots - max(used) < math.lcm(layout.length_multiple, layout.sequence_multiple), "no longer than needed"
        assert mini.fill == answers.lengths[mini.answers].sum() / (len(used) * mini.slots)


def runs_of(groups: np.ndarray, size: int) -> list[list[int]]:
    numbers = sorted(set(groups.tolist()))
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


@given(layouts_and_answers())
@settings(max_examples=100, deadline=None)
def test_a_plan_is_the_same_whenever_it_is_made_and_its_terms_whatever_the_layout(case):
    answers, layout = case
    for reduction in ("constant", "token-mean", "sequence-mean"):
        made, again = (plan(answers, layout, rates, reduction, 7.0) for _ in range(2))
        assert made.mini_batches == again.mini_batches
        one = plan(answers, Layout(1, 10_000, layout.prompts_per_update), rates, reduction, 7.0)
        for name in ("correct_rates", "weights", "scales"):
            np.testing.assert_array_equal(getattr(made, name), getattr(one, name))
        assert np.isfinite(made.scales).all(), "a mini-batch without a trained token has a denominator, too"


# Where an answer may be nearly as long as a micro-batch and a replica has few of them, no packing is tight: a micro-batch is at least as
# long as the longest answer. At 16,384 over 32 replicas that is so (four or five micro-batches of 14,500 slots or more).
@pytest.mark.parametrize(("replicas", "budget"), [(8, 16_384), (16, 16_384), (8, 32_768), (16, 32_768), (32, 32_768), (32, 131_072)])
@pytest.mark.parametrize("sigma", [0.7, 1.0])
def test_a_16k_reasoning_run_is_packed_tightly_and_evenly(replicas, budget, sigma):
    """Published mini-batches of 512 answers: 97 % of the slots hold a token, the slowest replica is within 3 % of the mean."""
    answers, k = answers_of(*reasoning_lengths(128, seed=3, sigma=sigma)), 1.5e-5
    made = plan(answers, Layout(replicas, budget, 32, k, length_multiple=128), rates, "constant", 1.0)
    for mini in made.mini_batches:
        assert mini.fill >= 0.97
        lengths = [answers.lengths[[a for batch in replica for a in batch]] for replica in mini.micro_batches]
        costs = [(n + k * n * n).sum() for n in lengths]
        assert max(costs) < 1.03 * np.mean(costs)
        works = [len(mini.micro_batches[0]) * mini.slots + k * (n * n).sum() for n in lengths]
        assert max(works) < 1.03 * np.mean(costs), "padding counted, against no padding and perfect balance"


def test_few_long_answers_are_as_tight_as_the_longest_allows():
    answers, replicas, budget = answers_of(*reasoning_lengths(128, seed=3, sigma=1.0)), 32, 16_384
    made = plan(answers, Layout(replicas, budget, 32, 1.5e-5, length_multiple=128), rates, "constant", 1.0)
    for mini in made.mini_batches:
        lengths = answers.lengths[mini.answers]
        least = max(lengths.sum(), replicas * lengths.max() * -(-lengths.sum() // (replicas * budget)))
        assert least / (replicas * len(mini.micro_batches[0]) * mini.slots) > 0.97


def test_attention_is_what_is_balanced():
    """By tokens the micro-batch of one long answer is the lightest; by its square it is the dearest, and is put beside the cheapest."""
    lengths = np.array([25, 25, 25, 25, 33, 33, 34, 50, 50, 90])
    answers = made_answers(np.ones(10, int), lengths - 1, lengths - 1, np.ones(10), 10)
    for k, of_longest in ((0.01, [25] * 4 + [90]), (0.0, [33, 33, 34, 90])):
        [mini] = plan(answers, Layout(2, 100, 1, attention_cost=k), rates, "constant", 1.0).mini_batches
        replicas = [sorted(lengths[[a for batch in replica for a in batch]].tolist()) for replica in mini.micro_batches]
        assert of_longest in replicas and mini.fill == 390 / 400
    assert lengths[mini.micro_batches[0][0]].sum() == 100  # a replica's dearest comes first


def test_more_replicas_than_answers_leaves_empty_micro_batches():
    answers = make_answers(groups=1, n=2)
    mini = make_plan(answers, data=4, prompts=1).mini_batches[0]
    assert sorted(len(batches[0]) for batches in mini.micro_batches) == [0, 0, 1, 1]


def test_an_answer_longer_than_the_budget_is_a_user_error():
    with pytest.raises(UserError, match="tokens_per_micro_batch is 16"):
        make_plan(make_answers(), tokens=16)


def test_pack_lays_answers_end_to_end():
    made = make_plan(
        made_answers(np.array([2, 3]), np.array([3, 2]), np.array([2, 2]), np.array([1.0, 0.0]), 2), data=1, tokens=16, prompts=1
    )
    answers = {
        0: TrainingAnswer([1, 2], [3, 4, 5], [-0.1, float("nan"), -0.3], [1, 0, 1], 1.0),  # a tool's token has no log-prob
        1: TrainingAnswer([6, 7, 8], [9, 10], [-0.4, -0.5], [1, 1], 0.0),
    }
    batch = pack([0, 1], answers, made, tokens=16)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] + [0] * 6
    assert batch.cu_seqlens.tolist() == [0, 5, 10, 16] and batch.max_seqlen == 6
    assert batch.positions.tolist()[:10] == [0, 1, 2, 3, 4] * 2
    # position 1 (the last prompt token) predicts the first response token
    assert batch.loss_mask.tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 1, 0] + [0] * 6
    counted = batch.loss_mask.bool()
    assert batch.targets[counted].tolist() == [3, 5, 9, 10]
    torch.testing.assert_close(batch.sampler_logprobs[counted], torch.tensor([-0.1, -0.3, -0.4, -0.5]))
    assert batch.verdict[counted].tolist() == [1, 1, 0, 0]
    assert batch.correct_rate[counted].tolist() == [0.5] * 4
    assert all((getattr(batch, name)[~counted] == 0).all() for name in ("sampler_logprobs", "verdict", "correct_rate", "weight", "scale"))
    assert batch.answer_index.tolist() == [0] * 5 + [1] * 5 + [2] * 6


def test_pack_pads_answers_to_a_multiple():
    """As context parallelism asks for: bounds at multiples of 4; the slots between belong to the answer before them and predict nothing."""
    made = make_plan(made_answers(np.array([2, 3]), np.array([3, 1]), np.array([2, 1]), np.ones(2), 2), data=1, tokens=20, prompts=1)
    answers = {
        0: TrainingAnswer([1, 2], [3, 4, 5], [-0.1, -0.2, -0.3], [1, 0, 1], 1.0),
        1: TrainingAnswer([6, 7, 8], [9], [-0.4], [1], 1.0),
    }
    batch, plain = pack([0, 1], answers, made, 20, sequence_multiple=4), pack([0, 1], answers, made, 20)
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 20]
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 9] + [0] * 8
    assert batch.positions.tolist() == [*range(8), *range(4), *range(8)]
    assert batch.answer_index.tolist() == [0] * 8 + [1] * 4 + [2] * 8
    assert batch.loss_mask.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0] + [0] * 8
    for name in ("targets", "sampler_logprobs", "scale", "weight", "verdict", "correct_rate"):
        mine, theirs = (getattr(b, name)[b.loss_mask == 1] for b in (batch, plain))
        assert torch.equal(mine, theirs), name
    assert pack([1, 0], answers, made, 12, sequence_multiple=4).cu_seqlens.tolist() == [0, 4, 12, 12]  # no tail


def test_a_budget_that_padded_answers_cannot_fill_is_a_user_error():
    with pytest.raises(UserError, match=r"tokens_per_micro_batch \(66\) is no multiple of 4"):
        plan(make_answers(), Layout(2, 66, 2, sequence_multiple=4), rates, "constant", 1.0)


def test_pack_of_nothing_is_all_padding():
    batch = pack([], {}, make_plan(make_answers()), tokens=8)
    assert batch.loss_mask.sum() == 0 and batch.cu_seqlens.tolist() == [0, 8]


def test_joined_micro_batches_keep_their_sequences_and_answers_apart():
    plan, made = (
        make_plan(make_answers()),
        {
            0: TrainingAnswer([1, 2], [3, 4, 5], [-0.1, -0.2, -0.3], [1, 0, 1], 1.0),
            1: TrainingAnswer([6, 7, 8], [9, 10], [-0.4, -0.5], [1, 1], 0.0),
        },
    )
    parts = [pack(members, made, plan, tokens=8) for members in ([0], [], [1])]
    joined = join(parts)
    assert joined.cu_seqlens.tolist() == [0, 5, 8, 16, 16 + 5, 24] and joined.max_seqlen == 8
    assert joined.cu_seqlens.dtype == torch.int32 and joined.answers == [0, 1]
    assert joined.answer_index.tolist() == [0] * 5 + [1] * 3 + [2] * 8 + [3] * 5 + [4] * 3
    for name in ("tokens", "targets", "positions", "loss_mask", "sampler_logprobs", "weight"):
        assert getattr(joined, name).tolist() == [x for part in parts for x in getattr(part, name).tolist()], name
    joined.old_logprobs, joined.correction = torch.arange(24.0), torch.arange(24.0) + 100
    split(joined, parts)
    assert [part.old_logprobs.tolist() for part in parts] == [list(range(i, i + 8)) for i in (0, 8, 16)]
    assert parts[1].correction.tolist() == list(range(108, 116))


def uneven_answers() -> Answers:
    """Three groups of 3, 1 and 2 answers; of the first one answer is not trained on."""
    lengths = np.array([4, 6, 9, 5, 2, 8])
    return Answers(
        np.full(6, 3), lengths, lengths * [1, 0, 1, 1, 1, 1], np.array([1.0, 0, 0, 1, 1, 0]), np.zeros(6), np.array([0, 0, 0, 1, 2, 2])
    )


def test_groups_may_be_of_unequal_size():
    """Where answers were dropped: r̂ is of those that are left, mini-batches count groups."""
    made = make_plan(uneven_answers(), data=1, prompts=2)
    np.testing.assert_allclose(made.correct_rates, [1 / 3] * 3 + [1.0] + [0.5] * 2)
    np.testing.assert_allclose(made.weights, 1 - made.correct_rates)
    assert [mini.answers for mini in made.mini_batches] == [[0, 1, 2, 3], [4, 5]]


def test_an_answer_without_a_trained_token_is_in_no_denominator():
    """Of the first mini-batch (4, 0, 9, 5 trained tokens): 18 tokens, 3 answers; in r̂ it counts like any other."""
    np.testing.assert_allclose(make_plan(uneven_answers(), data=1, reduction="token-mean").scales[:4], 1 / 18)
    np.testing.assert_allclose(
        make_plan(uneven_answers(), data=1, reduction="sequence-mean").scales[[0, 2, 3]], 1 / (3 * np.array([4, 9, 5]))
    )
    for reduction in ("token-mean", "sequence-mean"):
        scales = make_plan(uneven_answers(), data=1, reduction=reduction, per_sequence=True).scales
        np.testing.assert_allclose(scales[:4], 1 / 3)  # one term an answer


def test_weights_see_the_verdicts_and_penalties_of_a_whole_group():
    answers, seen = uneven_answers(), []
    answers.penalties[:] = [-0.5, 0, 0, 0, -1, 0]

    def weights(verdicts, penalties):
        seen.append((verdicts.tolist(), penalties.tolist()))
        return verdicts + penalties

    made = plan(answers, Layout(1, 64, 2), weights, "constant", 1.0)
    assert seen == [([1, 0, 0], [-0.5, 0, 0]), ([1], [0]), ([1, 0], [-1, 0])]
    np.testing.assert_array_equal(made.weights, [0.5, 0, 0, 1, 0, 0])

import numpy as np
import pytest
import torch

from megatron_nft.batching import Answers, Layout, TrainingAnswer, pack, plan
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


def test_balance_and_fill():
    answers = make_answers(groups=64, n=8, longest=100)
    mini = make_plan(answers, data=4, tokens=1024, prompts=64).mini_batches[0]
    loads = [sum(answers.lengths[a] for batch in batches for a in batch) for batches in mini.micro_batches]
    assert max(loads) - min(loads) <= 100
    assert mini.fill > 0.9


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
        0: TrainingAnswer([1, 2], [3, 4, 5], [-0.1, -0.2, -0.3], [1, 0, 1], 1.0),
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
    assert batch.answer_index.tolist() == [0] * 5 + [1] * 5 + [2] * 6


def test_every_answer_takes_a_multiple_of_slots():
    """So that context-parallel ranks can share it out; what is behind an answer is padding and belongs to its sequence."""
    answers = {
        0: TrainingAnswer([1, 2], [3, 4, 5], [-0.1, -0.2, -0.3], [1, 1, 1], 1.0),
        1: TrainingAnswer([6, 7], [8, 9], [-0.4, -0.5], [1, 1], 0.0),
    }
    batch = pack([0, 1], answers, make_plan(made_answers(*np.array([[2, 2], [3, 2], [3, 2], [1, 0]]), n=2), prompts=1), 16, 4)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 9, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.positions.tolist() == [*range(8), *range(4), *range(4)]
    assert batch.loss_mask.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert batch.answer_index.tolist() == [0] * 5 + [2] * 3 + [1] * 4 + [2] * 4


def test_slots_and_micro_batches_are_rounded_up():
    answers = make_answers()
    layout = Layout(2, 64, 2, sequence_multiple=8, micro_batch_multiple=4)
    made = plan(answers, layout, lambda verdicts, _: verdicts, "constant", 1.0)
    for mini in made.mini_batches:
        assert len({len(batches) for batches in mini.micro_batches}) == 1 and len(mini.micro_batches[0]) % 4 == 0
        for batch in (batch for batches in mini.micro_batches for batch in batches):
            assert sum(-(-answers.lengths[a] // 8) * 8 for a in batch) <= 64
    with pytest.raises(UserError, match="59 tokens long, train.tokens_per_micro_batch is 60"):
        longest = made_answers(*np.array([[20], [39], [39], [1]]), n=1)
        plan(longest, Layout(1, 60, 1, sequence_multiple=8), lambda verdicts, _: verdicts, "constant", 1.0)


def test_pack_of_nothing_is_all_padding():
    batch = pack([], {}, make_plan(make_answers()), tokens=8)
    assert batch.loss_mask.sum() == 0 and batch.cu_seqlens.tolist() == [0, 8]


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

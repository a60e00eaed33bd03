"""The stream of examples of the warm start, and its denominators."""

import numpy as np

from megatron_nft.batching import Layout, TrainingAnswer
from megatron_nft.supervised import draw, fingerprint, plan


def test_every_example_once_an_epoch_in_a_new_order():
    numbers = [n for step in range(1, 11) for n in draw(20, 6, step, seed=1)]
    epochs = [numbers[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_is_the_same_whenever_it_is_asked_for():
    """So a resumed run goes on with the examples that come next."""
    assert draw(20, 6, 7, seed=1) == [n for step in range(1, 11) for n in draw(20, 6, step, seed=1)][36:42]
    assert draw(20, 6, 7, seed=1) != draw(20, 6, 7, seed=2)


def test_the_loss_is_the_mean_over_answer_tokens_whatever_the_layout():
    chosen = [TrainingAnswer([1] * p, [2] * r, [0.0] * r, [1] * r, 1.0) for p, r in ((3, 5), (2, 9), (4, 1), (2, 2))]
    for replicas, tokens in ((1, 64), (2, 16), (4, 12)):
        found = plan(chosen, Layout(replicas, tokens, len(chosen)))
        assert np.allclose(found.scales, 1 / 17, rtol=1e-15)
        assert sorted(found.replica_of()) == [0, 1, 2, 3] and len(found.mini_batches) == 1


def test_a_fingerprint_tells_of_every_token_and_the_order():
    one, two = (TrainingAnswer([n], [n, 2], [0.0, 0.0], [1, 1], 1.0) for n in (1, 3))
    other = TrainingAnswer([1, 1], [2], [0.0], [1], 1.0)  # the same tokens, parted elsewhere
    assert fingerprint([one, two]) == fingerprint([one, two])
    assert len({fingerprint(e) for e in ([one, two], [two, one], [one], [other, two])}) == 4

"""The queue alone: what is sent, in which order, when a step has enough, what is carried, resumed, given up and put back."""

import json
from dataclasses import replace

import pytest

from megatron_nft.config import Config
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rollout.queue import Queue, seed_of
from megatron_nft.trajectories import Response, Verdict
from tests.unit.rollout.fakes import MIXED, fake_prompt

N = 3


def queue(wanted: int = 2, prompts: int = 50, per_update: int = 1, **settings) -> Queue:
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.train.prompts_per_update = wanted, N, per_update
    config.reward.truncated = settings.pop("truncated", "wrong")
    skipped = settings.pop("most_skipped", 0.0)
    for name, value in ({"order": "started", "max_staleness": 1} | settings).items():
        setattr(config.rollout, name, value)
    cursor = Cursor(PromptSet([fake_prompt(MIXED, i) for i in range(prompts)]), config.seed, shuffle=False, most_skipped=skipped)
    return Queue(cursor, config)


def send(own: Queue, most: int = 100) -> list[int]:
    """The keys of all that the queue wants to have sent."""
    keys = []
    while len(keys) < most and (ticket := own.next()) is not None:
        keys.append(ticket.key)
    return keys


def answered(score: float, version: int = 0, tokens: int = 4, reason: str = "stop") -> Response:
    return Response([7] * tokens, [-1.0] * tokens, reason, version, "", verdict=Verdict(score, "right" if score else "wrong"))


def partial(tokens: int, version: int = 0) -> Response:
    return Response([8] * tokens, [-2.0] * tokens, "unfinished", version, "")


def judge(own: Queue, key: int, *scores: float, **about) -> None:
    for sample, score in enumerate(scores):
        own.judged(key, sample, answered(score, **about))


def test_groups_whose_verdicts_are_alike_promise_less_and_others_are_sent_instead():
    own = queue(wanted=10, max_staleness=0)
    own.begin(1, 0)
    first = send(own)
    for key in first:
        judge(own, key, 0, 0)
    assert send(own, 1), "two verdicts of three are alike in all of them"
    mixed = queue(wanted=10, max_staleness=0)
    mixed.begin(1, 0)
    for key in send(mixed):
        judge(mixed, key, 0, 1)
    assert not send(mixed, 1)


def test_groups_are_taken_in_the_order_of_starting_and_one_that_cannot_be_carried_is_waited_for():
    own = queue(max_staleness=0)
    own.begin(1, 0)
    send(own)
    judge(own, 1, 1, 0, 1)
    judge(own, 2, 1, 1, 0)
    assert not own.enough, "the group 0 may be as long as any"
    judge(own, 0, 0, 0, 0)
    assert own.enough
    taken = own.take()
    assert [group.key for group in taken.kept] == [1, 2] and [group.key for group in taken.uniform] == [0]


def test_one_that_can_be_carried_is_not_waited_for_until_it_would_become_too_old():
    own = queue()
    own.begin(1, 0)
    send(own)
    for key in (3, 1, 2):
        judge(own, key, 1, 0, 1)
    assert own.enough and [group.key for group in own.take().kept] == [1, 2]
    own.begin(2, 1)
    send(own)
    judge(own, 8, 1, 0, 1)
    assert not own.enough, "two are there, but 0 was started with the weights before"
    judge(own, 0, 1, 0, 1)
    for key in range(4, 7):
        judge(own, key, 0, 0, 0)
    assert own.enough and [group.key for group in own.take().kept] == [0, 3]


def test_in_the_order_of_finishing_the_early_ones_are_taken():
    own = queue(order="finished")
    own.begin(1, 0)
    send(own)
    for key in (3, 0, 2):
        judge(own, key, 1, 0, 1)
    assert own.enough and [group.key for group in own.take().kept] == [3, 0]


def test_mixed_groups_are_known_before_they_are_complete_and_no_more_prompts_sent_for_them():
    """Wanted 2, none ahead: 11 of which a third, 3.7, is hoped to be mixed, and 2.1 be it by a standard deviation fewer."""
    own = queue(max_staleness=0)
    own.begin(1, 0)
    assert len(send(own)) == 11
    judge(own, 0, 1, 0)
    judge(own, 4, 0, 1)
    assert send(own) == [] and not own.enough
    judge(own, 1, 0, 0, 0)
    assert send(own) == []


def test_more_prompts_are_sent_when_fewer_groups_are_mixed_than_hoped():
    own = queue(max_staleness=0, max_prompts_per_step=99)
    own.begin(1, 0)
    for key in send(own):
        judge(own, key, 0, 0, 0)
    assert len(send(own)) == 79, (
        "of 1.5 half a one was assumed to be mixed, none of 11 was: of 79 are hoped for 3.2, and 2 by a standard deviation fewer"
    )


@pytest.mark.parametrize("staleness, count", [(0, 11), (1, 12), (2, 18)])
def test_the_next_steps_groups_are_begun_while_the_last_ones_are_waited_for(staleness, count):
    own = queue(max_staleness=staleness, max_prompts_per_step=99)
    own.begin(1, 0)
    assert len(send(own)) == count


def test_surplus_groups_are_carried_and_thrown_away_when_too_old():
    own = queue()
    own.begin(1, 0)
    for key in send(own)[:4]:
        judge(own, key, 1, 0, 1)
    assert [group.key for group in own.take().kept] == [0, 1]
    assert own.begin(2, 1) == [] and own.enough, "two are left over"
    own = queue()
    own.begin(1, 0)
    for key in send(own)[:4]:
        judge(own, key, 1, 0, 1)
    own.take()
    assert own.begin(3, 2)[:2] == [2, 3] and not own.enough
    judge(own, 2, 1, 0, 1)  # news of a group that is gone
    assert own.take().stale[0].key == 2


def test_the_prompt_of_a_group_that_became_too_old_before_it_was_complete_is_sent_anew():
    """Or long answers would be missing from the epoch."""
    own = queue(order="finished")
    own.begin(1, 0)
    for key in send(own)[1:]:
        judge(own, key, 1, 0, 1)
    own.take()
    assert own.begin(3, 2)[0] == 0
    ticket = own.next()
    assert ticket.prompt.id == "set/0" and ticket.key != 0


def test_without_staleness_nothing_is_carried_and_no_prompt_lost():
    own = queue(max_staleness=0, unfinished="resume")
    own.begin(1, 0)
    for key in send(own)[:3]:
        judge(own, key, 1, 0, 1)
    taken = own.take()
    assert [group.key for group in taken.surplus] == [2]
    for group in own.running():
        own.pause(group.key, True, {0: partial(3)})
    own.begin(2, 1)
    ticket = own.next()
    assert (ticket.prompt.id, ticket.key) == ("set/3", 11) and len(ticket.requests) == N


def test_an_unfinished_answer_goes_on_with_its_tokens_and_what_is_left_of_its_length():
    own = queue(max_tokens=10)
    own.begin(1, 0)
    first = own.next(holder=1)
    own.judged(first.key, 1, answered(1.0))
    own.pause(first.key, True, {0: partial(4), 2: partial(9)})
    own.begin(2, 1)
    assert own.next(holder=0).key != first.key, "another engine does not have its beginning"
    again = own.next(holder=1)
    assert again.key == first.key and [sample for sample, _ in again.requests] == [0, 2]
    for (sample, request), tokens in zip(again.requests, (4, 9)):
        original = first.requests[sample][1]
        assert request.token_ids == original.token_ids + (8,) * tokens and request.max_tokens == 10 - tokens
        assert request.seed == seed_of(original.seed, tokens) != original.seed
    whole = own.so_far(first.key, 0).followed_by(Response([9, 9], [-3.0, -3.0], "stop", 1, "x"), "all")
    assert whole.token_ids == [8, 8, 8, 8, 9, 9] and whole.logprobs == [-2.0] * 4 + [-3.0] * 2
    assert (
        whole.loss_mask is None and own.so_far(first.key, 0).followed_by(replace(whole, loss_mask=[0] * 6), "").mask() == [1] * 4 + [0] * 6
    )
    assert whole.versions == [0] * 4 + [1] * 2 and (whole.finish_reason, whole.text) == ("stop", "all")


@pytest.mark.parametrize("unfinished, begun", [("drop", True), ("resume", False)])
def test_a_group_that_does_not_go_on_is_sent_anew_with_the_new_weights(unfinished, begun):
    """Dropped by the setting, or with an answer that had not begun: all answers of a group are started from one version."""
    own = queue(unfinished=unfinished)
    own.begin(1, 0)
    ticket = own.next()
    own.judged(ticket.key, 0, answered(1.0))
    own.pause(ticket.key, begun, {1: partial(2), 2: partial(0)})
    own.begin(2, 1)
    again = own.next()
    assert again.prompt == ticket.prompt and again.key != ticket.key and len(again.requests) == N
    judge(own, again.key, 1, 0, 0, version=1)
    assert own.carried()[0].version == 1


def test_what_an_engine_lost_is_sent_again_and_counted_once():
    own = queue()
    own.begin(1, 0)
    ticket = own.next()
    own.judged(ticket.key, 0, answered(1.0))
    own.put_back(ticket.key)
    again = own.next()
    assert again.key == ticket.key and [sample for sample, _ in again.requests] == [1, 2]
    own.judged(ticket.key, 0, answered(0.0))  # a late word of the engine that was given up
    for sample in (1, 2):
        own.judged(ticket.key, sample, answered(1.0))
    assert own.carried()[0].group().correct_rate == 1.0


def test_what_was_lost_under_older_weights_is_started_anew_as_a_whole():
    own = queue()
    own.begin(1, 0)
    ticket = own.next()
    own.judged(ticket.key, 0, answered(1.0))
    own.begin(2, 1)
    own.put_back(ticket.key)
    assert [sample for sample, _ in own.next().requests] == [0, 1, 2] and own.carried()[0].version == 1


def test_hopeless_groups_are_given_up():
    own = queue(hopeless_after=2)
    own.begin(1, 0)
    send(own)
    judge(own, 0, 0, 0)
    judge(own, 1, 0, 1)
    judge(own, 2, 0)
    assert own.hopeless() == [0] and own.hopeless() == []
    assert own.state_dict()["share"] == [0.5, 2.5]  # half of what was assumed, and one that is not mixed
    assert [group.key for group in own.take().hopeless] == [0]


def test_groups_that_were_given_up_count_as_uniform_where_the_share_of_mixed_ones_is_asked_for():
    own = queue(hopeless_after=2, max_staleness=0, max_prompts_per_step=99)
    own.begin(1, 0)
    for key in send(own):
        judge(own, key, 0, 0)
    assert len(own.hopeless()) == 11 and len(send(own)) == 79, "as many as after 11 uniform ones"


def test_dropped_answers_make_no_group_mixed():
    own = queue(truncated="drop")
    own.begin(1, 0)
    send(own)
    own.judged(0, 0, answered(0.0, reason="length"))
    for sample in (1, 2):
        own.judged(0, sample, answered(1.0))
    assert [group.key for group in own.take().uniform] == [0]


def test_a_checkpoint_keeps_all_that_goes_on():
    """The restored queue sends what the saved one sends, with the same seeds, and takes the same groups."""

    def stopped() -> Queue:
        own = queue(wanted=1, most_skipped=0.9)
        own.begin(1, 0)
        send(own)
        judge(own, 0, 0, 0, 0)
        judge(own, 1, 1, 0, 1)
        judge(own, 2, 1, 1, 0)
        own.take()
        for group in own.running():
            own.pause(group.key, group.key != 4, {sample: partial(2) for sample in range(N)})
        return own

    saved = stopped()
    state = json.loads(json.dumps(saved.state_dict()))
    groups = [(group.key, group.prompt.id, group.holder, group.responses) for group in saved.carried()]
    restored = queue(wanted=1, most_skipped=0.9)
    restored._cursor.load_state_dict(json.loads(json.dumps(saved._cursor.state_dict())))
    restored.load(state, groups)
    for own in (saved, restored):
        own.begin(2, 1)
    assert saved.enough and restored.enough
    assert [group.key for group in saved.take().kept] == [group.key for group in restored.take().kept] == [2]
    assert [saved.next() for _ in range(4)] == [restored.next() for _ in range(4)]


def test_a_checkpoint_keeps_the_order_of_finishing():
    saved = queue(wanted=1, order="finished")
    saved.begin(1, 0)
    send(saved)
    for key in (3, 2, 0):
        judge(saved, key, 1, 0, 1)
    assert [group.key for group in saved.take().kept] == [3]
    restored = queue(wanted=1, order="finished")
    complete = [(group.key, group.prompt.id, group.holder, group.responses) for group in saved.carried() if group.is_complete]
    restored.load(json.loads(json.dumps(saved.state_dict())), complete)
    for own in (saved, restored):
        own.begin(2, 1)
        assert [group.key for group in own.take().kept] == [2]


def test_prompts_of_uniform_groups_are_passed_over_and_come_again():
    """Three prompts, one of which is never mixed: it comes less often than the others, and does not stay away."""
    own = queue(wanted=1, prompts=3, order="prompt", max_staleness=0, most_skipped=0.9, max_prompts_per_step=8)
    sent = []
    for step in range(1, 60):
        own.begin(step, step - 1)
        while not own.enough and (ticket := own.next()) is not None:
            sent.append(ticket.prompt.id)
            judge(own, ticket.key, *([1, 1, 1] if ticket.prompt.id == "set/1" else [0, 1, 1]))
        own.take()
    counts = {name: sent.count(name) for name in ("set/0", "set/1", "set/2")}
    assert counts["set/0"] + counts["set/2"] == 59 and 3 <= counts["set/1"] < counts["set/0"] / 2

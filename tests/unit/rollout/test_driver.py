"""What drives the servers, tick by tick: all answers of a group are started from one weight version, whatever servers lose and when."""

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from megatron_nft.config import Config
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rollout.asynchronous import MOST_LOSSES, Driver
from megatron_nft.rollout.fleet import Inbox
from megatron_nft.trajectories import Response, Verdict
from tests.unit.rollout.fakes import MIXED, fake_prompt

N = 3


class FakeFleet:
    """One server of 3 groups' slots; a test says what becomes of the answers."""

    def __init__(self):
        self.inbox, self.running_answers, self.asked = Inbox(), {}, []

    @property
    def room(self) -> int:
        return 3 * N - len(self.running_answers)

    free = room

    def send(self, key, sample, request) -> None:
        self.running_answers[key, sample] = None
        self.asked.append((key, sample, len(request.token_ids)))

    def finish(self, key, sample, version, tokens=2) -> None:
        del self.running_answers[key, sample]
        self.inbox.finished.append((key, sample, response(tokens, version, "stop")))

    def lose(self, key, sample, version, tokens) -> None:
        del self.running_answers[key, sample]
        self.inbox.lost.append((key, sample, response(tokens, version, "unfinished")))

    def poll(self):
        return [self.inbox.finished.popleft() for _ in range(len(self.inbox.finished))]

    def lost(self):
        return [self.inbox.lost.popleft() for _ in range(len(self.inbox.lost))]

    def so_far(self):
        return {at: known for at, known in self.running_answers.items() if known is not None}

    def withdraw(self, keys):
        mine = [at for at in self.running_answers if at[0] in keys]
        return [(*at, self.running_answers.pop(at) or response(0, 0, "unfinished")) for at in mine]

    def abort(self, keys) -> None:
        self.withdraw(set(keys))

    def running(self) -> int:
        return len(self.running_answers)

    def statistics(self) -> dict:
        return {}


class LateJudge:
    """Finds all answers right; not `now`: when it is told to speak."""

    def __init__(self):
        self.waiting: deque[Future] = deque()
        self.now = True

    def submit(self, text, prompt) -> Future:
        self.waiting.append(Future())
        waiting = self.waiting[-1]
        if self.now:
            self.speak()
        return waiting

    def speak(self) -> None:
        while self.waiting:
            self.waiting.popleft().set_result(Verdict(1.0, "right"))


def response(tokens: int, version: int, reason: str) -> Response:
    return Response([7] * tokens, [-1.0] * tokens, reason, version, "")


@pytest.fixture
def made():
    """A driver whose thread has ended, in its first step: a test calls _advance in its place."""
    config = Config()
    config.rollout.prompts_per_step, config.rollout.n, config.train.prompts_per_update = 2, N, 1
    config.rollout.mode, config.rollout.order, config.rollout.max_staleness = "served", "started", 1
    fleet, judge = FakeFleet(), LateJudge()
    cursor = Cursor(PromptSet([fake_prompt(MIXED, i) for i in range(50)]), config.seed, shuffle=False)
    driver = Driver(SimpleNamespace(fleet=fleet, decode=lambda ids: ""), judge, cursor, config)
    driver.close()
    driver.begin(1, 0)
    driver._advance()
    assert len(fleet.running_answers) == 3 * N
    return driver, fleet, judge


def starts(driver: Driver, key: int) -> set[int]:
    """The versions from which the answers of a complete group were started."""
    group = driver._queue._open[key]
    assert group.is_complete and len(group.judged) == N
    return {one.weight_version for one in group.responses} | {group.version}


def test_answers_lost_during_a_sync_start_with_their_whole_group_from_the_new_weights(made):
    """One is judged, the others were lost without a token after the step's end and before the next one."""
    driver, fleet, _ = made
    fleet.finish(0, 0, 0)
    driver._advance()
    driver.hold()
    fleet.lose(0, 1, 0, 0)
    fleet.lose(0, 2, 0, 0)
    driver._advance()
    driver.begin(2, 1)
    driver._advance()
    assert [(0, sample, 2) for sample in range(N)] == fleet.asked[-N:]
    for sample in range(N):
        fleet.finish(0, sample, 1)
    driver._advance()
    assert starts(driver, 0) == {1}


@pytest.mark.parametrize("late", [False, True])
def test_answers_lost_one_after_the_other_keep_what_they_had(made, late):
    """As with served.update abort: between the first and the last of a group the thread looks. late: one has ended, and its verdict comes
    last."""
    driver, fleet, judge = made
    judge.now = not late
    fleet.running_answers[0, 2] = response(5, 0, "unfinished")
    fleet.finish(0, 0, 0)
    fleet.lose(0, 1, 0, 4)
    driver.hold()
    driver._advance()
    assert (0, 2) not in fleet.running_answers
    state = driver.state_dict()
    judge.now = True
    judge.speak()
    driver._advance()
    driver.begin(2, 1)
    driver._advance()
    assert [sent for sent in fleet.asked if sent[0] == 0][N:] == [(0, 1, 6), (0, 2, 7)], "prompts of two tokens, and what was there"
    for sample in (1, 2):
        fleet.finish(0, sample, 1)
    driver._advance()
    assert starts(driver, 0) == {0}
    assert [len(one.token_ids) for one in driver._queue._open[0].responses] == [2, 6, 7]
    kept = [[len(one.token_ids) for one in group.responses] for group in driver.carried]
    assert (kept, "set/0" in state["again"]) == (([], True) if late else ([[2, 4, 5]], False))


def test_an_answer_that_waited_at_its_server_for_new_weights_takes_its_group_with_it(made):
    driver, fleet, _ = made
    fleet.finish(0, 0, 0)
    driver._advance()
    driver.hold()
    fleet.finish(0, 1, 1)
    driver._advance()
    driver.begin(2, 1)
    for _ in range(2):
        driver._advance()
    assert fleet.asked[-N:] == [(0, sample, 2) for sample in range(N)]
    for sample in range(N):
        fleet.finish(0, sample, 1)
    driver._advance()
    assert starts(driver, 0) == {1}


def test_an_answer_that_had_ended_when_its_server_was_lost_is_not_resumed(made):
    driver, fleet, _ = made
    del fleet.running_answers[0, 0]
    fleet.inbox.lost.append((0, 0, response(3, 0, "stop")))
    driver._advance()
    assert driver._queue._open[0].responses[0].verdict is not None


def test_a_group_that_is_gone_is_not_waited_for(made):
    driver, fleet, _ = made
    fleet.lose(0, 0, 0, 0)
    driver.hold()
    driver._advance()
    driver.begin(3, 2)
    driver._advance()
    assert driver._partial == {} and all(key > 2 for key, *_ in fleet.asked[3 * N :])


def test_without_staleness_nothing_is_sent_between_two_steps(made):
    """It would be too old in the next one, and its prompts be lost."""
    driver, fleet, _ = made
    driver._rollout.max_staleness = 0
    driver.end(0)
    driver._advance()
    assert fleet.running_answers == {}
    driver.begin(2, 1)
    driver._advance()
    assert [driver._queue._open[key].prompt.id for key, sample, _ in fleet.asked[3 * N :] if not sample] == ["set/0", "set/1", "set/2"]


def test_a_group_that_is_lost_again_and_again_is_given_up(made):
    """It may be what its servers die of; without an end it would keep the step from ending."""
    driver, fleet, _ = made
    for _ in range(MOST_LOSSES + 1):
        assert 0 in driver._queue._open
        fleet.lose(0, 1, 0, 0)
        driver._advance()
    assert 0 not in driver._queue._open and not [at for at in fleet.running_answers if at[0] == 0]
    assert [group.key for group in driver._queue.take().hopeless] == [0]

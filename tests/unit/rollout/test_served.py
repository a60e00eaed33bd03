"""The served sampler: what it trains on while servers die, hang and come back, and what it writes ahead of the trainer."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from megatron_nft.config import Config, ServedConfig
from megatron_nft.prompts import Cursor, PromptSet
from megatron_nft.rollout import Request, member, served
from megatron_nft.rollout.asynchronous import ServedSampler
from megatron_nft.rollout.served import ServedEngine
from megatron_nft.stopping import Stopped
from megatron_nft.trajectories import Verdict
from tests.unit.rollout.fake_servers import FakeServer
from tests.unit.rollout.fakes import MIXED, fake_prompt
from tests.unit.rollout.test_fleet import MODEL, FakeLink, until, weights

N, WANTED, LENGTH = 2, 3, 3


class Alternating:
    """A judge for whom every second answer to a prompt is right."""

    def __init__(self):
        self.asked: Counter = Counter()

    def submit(self, text: str, prompt) -> Future:
        self.asked[prompt.id] += 1
        verdict: Future = Future()
        verdict.set_result(Verdict(1.0, "right") if self.asked[prompt.id] % 2 else Verdict(0.0, "wrong"))
        return verdict


class Run:
    """What a trainer has: an engine, a sampler, and weights."""

    def __init__(self, config: Config, stop: Callable[[], bool] | None = None):
        self.streams = 0
        self.engine = ServedEngine(config, self.weights, stop, note=lambda _: None)
        self.cursor = Cursor(PromptSet([fake_prompt(MIXED, i) for i in range(25)]), config.seed, shuffle=False)
        self.judge = Alternating()
        self.sampler = ServedSampler(self.engine, self.judge, self.cursor, config)

    def weights(self) -> Iterator:
        self.streams += 1
        return weights()

    def sync(self, version: int) -> None:
        self.sampler.sync(self.weights(), version)

    def close(self) -> None:
        self.sampler.close()
        self.engine.close()


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        made = [stack.enter_context(FakeServer()) for _ in range(2)]
        for server in made:
            server.length = LENGTH
        yield made


@pytest.fixture
def config(servers, tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(member, "open_link", FakeLink)
    monkeypatch.setattr(served, "load_weights", lambda _: SimpleNamespace(names=lambda: ["a", "b"]))
    monkeypatch.setattr(served, "set_environment", lambda _: None)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    monkeypatch.setattr(served, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer))
    made = Config(run_dir=str(tmp_path / "run"))
    made.model.path = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    made.data.max_prompt_length, made.rollout.max_tokens = 20, 20
    made.rollout.prompts_per_step, made.rollout.n, made.train.prompts_per_update = WANTED, N, 1
    made.rollout.mode, made.rollout.order, made.rollout.max_staleness = "served", "started", 1
    addresses = [server.address for server in servers]
    made.rollout.served = ServedConfig(addresses=addresses, start_timeout=10, token_timeout=1, transfer_timeout=10)
    return made


@pytest.fixture
def run(config) -> Iterator[Run]:
    made = Run(config)
    made.sync(0)
    yield made
    made.close()


def assert_whole(groups) -> None:
    """Every group with all of its answers, each once, and as the servers write them."""
    assert len(groups) == WANTED and len({group.prompt.id for group in groups}) == WANTED
    for group in groups:
        first = group.prompt.token_ids[-1] + 1
        assert [response.token_ids for response in group.responses] == [list(range(first, first + LENGTH))] * N
        assert all(len(response.logprobs) == LENGTH and response.finish_reason == "stop" for response in group.responses)
        assert group.correct_rate == 0.5


def test_a_step_gives_whole_groups_in_the_order_of_starting(run):
    result = run.sampler.groups(1)
    assert_whole(result.groups)
    assert [group.position for group in result.groups] == sorted(group.position for group in result.groups)
    assert result.statistics["answers_lost"] == 0 and result.statistics["staleness_max"] == 0 and not result.warnings
    assert result.statistics["servers"] == 2 and result.statistics["groups_kept"] == WANTED


def test_answers_are_written_while_the_trainer_trains_and_no_older_than_allowed(run, servers):
    run.sampler.groups(1)
    for step in range(2, 6):
        until(lambda: run.sampler._driver._queue.exhausted)  # all that is wanted of the next step is there, and nobody has asked for it
        run.sync(step - 1)
        result = run.sampler.groups(step)
        assert_whole(result.groups)
        assert result.statistics["staleness_max"] == 1 and result.statistics["idle_share"] <= 1
        assert {step - 1 - version for group in result.groups for r in group.responses for version in r.versions} <= {0, 1}


def test_between_a_sync_and_the_next_step_nothing_is_sent(run, servers):
    """So that a checkpoint has one moment of the cursor and of the queue."""
    run.sampler.groups(1)
    run.sync(1)
    sent, place = sum(len(server.requests) for server in servers), run.cursor.mark()
    until(lambda: run.engine.fleet.running() == 0)
    assert sum(len(server.requests) for server in servers) == sent and run.cursor.mark() == place


@pytest.mark.parametrize("fault", ["die", "hang", "out of the vocabulary"])
def test_what_a_server_loses_another_one_writes(run, servers, fault):
    """Nothing is counted twice: each group has its answers, and no more were judged than were written."""
    servers[0].fault = fault
    lost = 0
    for step in (1, 2):
        result = run.sampler.groups(step)
        lost += result.statistics["answers_lost"]
        assert_whole(result.groups)
        assert all(run.judge.asked[group.prompt.id] == N for group in result.groups)
        if step == 1:
            run.sync(1)
    assert lost > 0


def test_servers_that_come_back_when_none_is_left_get_the_weights_within_the_step(run, servers):
    for server in servers:
        server.stop()
        server.start()  # with other weights than were sent: what they write is no good
    streams = run.streams
    result = run.sampler.groups(1)
    assert_whole(result.groups)
    assert run.streams > streams and result.statistics["answers_lost"] > 0


def test_a_killed_server_every_step(run, servers):
    """Ten times: the steps stay whole."""
    for step in range(1, 11):
        victim = servers[step % 2]
        victim.fault = "die"
        assert_whole(run.sampler.groups(step).groups)
        victim.fault = None
        run.sync(step)
    assert len(run.engine.fleet.members) == 2


def test_without_staleness_nothing_is_written_ahead(config, servers):
    config.rollout.max_staleness, config.rollout.order = 0, "prompt"
    run = Run(config)
    run.sync(0)
    orders = []
    for step in (1, 2):
        groups = run.sampler.groups(step).groups
        assert_whole(groups)
        assert run.engine.fleet.running() == 0
        orders.append([group.prompt.id for group in groups])
        run.sync(step)
    assert orders == [["set/0", "set/1", "set/2"], ["set/3", "set/4", "set/5"]]
    run.close()


def test_what_a_server_refuses_is_a_fault_of_ours(run, servers):
    for server in servers:
        server.fault = "refuse"
    with pytest.raises(RuntimeError, match="inference/v1/generate: .*no"):
        run.sampler.groups(1)


def test_validation_is_answered_beside_the_rest_and_survives_a_death(run, servers):
    servers[0].fault = "die"
    asked = [Request((1, number), 0.0, 1.0, 20, 0) for number in range(12)]
    told = []
    responses = run.engine.generate(asked, lambda index, response: told.append((index, response)))
    assert [response.token_ids[0] for response in responses] == list(range(1, 13))
    assert sorted(index for index, _ in told) == list(range(12)) and all(response is responses[index] for index, response in told)


def test_tokens_that_come_are_beats_for_the_watchdog_and_silence_is_none(run, monkeypatch):
    beats, looks = [], iter(range(10))
    monkeypatch.setattr(served.watchdog, "beat", lambda: beats.append(True))

    def done() -> bool:
        look = next(looks)
        run.engine.fleet.written += look in (3, 5)
        return look == 9

    run.engine.until(done)
    assert len(beats) == 3, "at the beginning, and when tokens came"


def test_a_run_that_is_asked_to_stop(config, servers):
    stop = []
    run = Run(config, stop=lambda: bool(stop))
    run.sync(0)
    for server in servers:
        server.gate.clear()
    stop.append(True)
    with pytest.raises(Stopped):
        run.sampler.groups(1)
    with pytest.raises(Stopped):
        run.engine.generate([Request((1, 2), 0.0, 1.0, 20, 0)])
    run.close()


def test_a_checkpoint_has_complete_groups_and_answers_as_far_as_they_are(run, servers, config, tmp_path):
    for server in servers:
        server.gate.clear()  # answers stand after their first token
    run.sampler._driver.begin(1, 0)
    fleet = run.engine.fleet
    until(lambda: fleet.so_far() and all(response.token_ids for response in fleet.so_far().values()))
    run.sampler._driver.hold()
    cursor, state = run.cursor.state_dict(), json.loads(json.dumps(run.sampler.state_dict()))
    carried = run.sampler.carried()
    unfinished = [r for group in carried for r in group.responses if r.verdict is None]
    assert unfinished and all(len(r.token_ids) == len(r.logprobs) == 1 and r.finish_reason == "unfinished" for r in unfinished)
    run.sampler.write_carried(tmp_path, carried)
    again = Run(config)
    again.cursor.load_state_dict(cursor)
    again.sampler.load(state, tmp_path)
    for server in servers:
        server.gate.set()
        server.requests.clear()
    again.sync(1)
    kept = again.sampler.groups(2).groups
    assert_whole(kept)
    assert {group.position for group in kept} <= {group.position for group in carried}
    assert all(len(sent["token_ids"]) == 3 for server in servers for sent in server.requests[:1]), "the prompt and the token that was there"
    assert {tuple(r.versions) for group in kept for r in group.responses} == {(0, 1, 1)}
    again.close()


def test_a_sync_that_waits_for_servers_ends_when_the_run_is_asked_to_stop(run, monkeypatch):
    """So that the step is finished and saved; the servers keep the weights they had, and the stream is not begun."""
    monkeypatch.setattr(run.engine.fleet, "prepare", lambda seconds: False)
    monkeypatch.setattr(run.engine, "_asked_to_stop", lambda: True)
    stream = iter([1])
    assert run.engine.sync(stream, 9) is False and run.engine.weight_version != 9 and next(stream) == 1


def test_gather_and_the_rest_of_an_engine(run):
    assert (run.engine.count, run.engine.index, run.engine.is_first) == (1, 0, True)
    assert run.engine.gather({"a": 1}) == [{"a": 1}] and run.engine.checksums() == {}
    stream = iter([("a", 1), ("b", 2)])
    assert run.engine.differing(stream) == [] and next(stream, None) is None

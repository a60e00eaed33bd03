"""The client of several servers: who gets what, what becomes of it when a server fails, and how new weights reach those that are left."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from megatron_nft.config import Config, ServedConfig
from megatron_nft.errors import UserError
from megatron_nft.rollout import Request, member
from megatron_nft.rollout.fleet import Fleet, NoServer
from megatron_nft.rollout.remote import Refused, Remote
from tests.support import one_bucket
from tests.unit.rollout.fake_servers import FakeServer

MODEL = {"model_type": "qwen2", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2}
NAMES = frozenset({"a", "b"})


class FakeLink:
    """The trainer's end of a transfer that always works."""

    def __init__(self, *_):
        self.sent = 0

    def send(self, tensors) -> None:
        self.sent += len(tensors)

    def close(self) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(2)]


@pytest.fixture
def config(tmp_path) -> Config:
    made = Config(run_dir=str(tmp_path))
    made.data.max_prompt_length, made.rollout.max_tokens = 20, 20
    made.rollout.served = ServedConfig(count=2, start_timeout=10, token_timeout=20, transfer_timeout=10)
    return made


@pytest.fixture
def fleet(servers, config, monkeypatch) -> Iterator[Fleet]:
    """Of both servers, with their first weights."""
    monkeypatch.setattr(member, "open_link", FakeLink)
    made = start(config, servers)
    made.sync(weights(), 0, NAMES)
    yield made
    made.close()


def start(config: Config, servers: list[FakeServer]) -> Fleet:
    config.rollout.served.addresses = [server.address for server in servers]
    return Fleet(config, MODEL, lambda ids: " ".join(map(str, ids)), note=lambda _: None)


def weights(names=("a", "b")) -> Iterator:
    """One bucket for each tensor."""
    return iter([one_bucket([(name, torch.zeros(2))]) for name in names])


def request(last: int = 3, tokens: int = 4) -> Request:
    return Request((1, last), 1.0, 1.0, tokens, seed=9)


def gather(fleet: Fleet, finished: int = 0, lost: int = 0) -> tuple[dict, dict]:
    """So many answers, {(key, sample): response}."""
    found, gone, end = {}, {}, time.monotonic() + 15
    while len(found) < finished or len(gone) < lost:
        assert time.monotonic() < end, f"{len(found)} finished, {len(gone)} lost"
        fleet.inbox.changed.wait(0.1)
        fleet.inbox.changed.clear()
        found |= {(key, sample): response for key, sample, response in fleet.poll()}
        gone |= {(key, sample): response for key, sample, response in fleet.lost()}
    return found, gone


def until(condition) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_come_back_as_they_were_written(fleet, servers):
    fleet.send(7, 1, request())
    response = gather(fleet, 1)[0][7, 1]
    assert (response.token_ids, response.logprobs) == ([4, 5, 6, 7], [-0.5] * 4)
    assert (response.finish_reason, response.text, response.versions) == ("length", "4 5 6 7", [0] * 4)
    [sent] = [*servers[0].requests, *servers[1].requests]
    assert sent["token_ids"] == [1, 3] and sent["stream"] is True
    assert sent["sampling_params"] == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4, "logprobs": 0, "seed": 9, "detokenize": False}


def test_groups_stay_together_and_go_where_most_slots_are_free(fleet, servers):
    for server in servers:
        server.gate.clear()
    assert fleet.free == 8
    for key in range(4):
        for sample in range(2):
            fleet.send(key, sample, request(10 * key))
    until(lambda: len(servers[0].requests) == len(servers[1].requests) == 4)
    assert fleet.free == 0
    for server in servers:
        prompts = [sent["token_ids"][-1] for sent in server.requests]
        assert len(set(prompts)) == 2 and all(prompts.count(prompt) == 2 for prompt in prompts)
        server.gate.set()
    assert len(gather(fleet, 8)[0]) == 8 and fleet.free == 8


@pytest.mark.parametrize("fault", FakeServer.choices(0))
def test_garbage_is_no_answer(fleet, servers, fault):
    """The server is left out, and all that it was writing is lost, not only the answer that showed it."""
    servers[0].fault = fault
    servers[1].gate.clear()
    for key in range(2):
        fleet.send(key, 0, request())
    _, lost = gather(fleet, lost=1)
    assert fleet.members == [servers[1].address]
    servers[1].gate.set()
    finished, _ = gather(fleet, 1)
    assert set(lost) | set(finished) == {(0, 0), (1, 0)} and not set(lost) & set(finished)


def test_a_dead_server_loses_what_it_was_writing_and_no_more(fleet, servers):
    servers[0].fault = "die"
    for key in range(4):
        fleet.send(key, 0, request())
    finished, lost = gather(fleet, finished=2, lost=2)
    assert not set(lost) & set(finished) and fleet.members == [servers[1].address]
    assert all(response.finish_reason == "unfinished" for response in lost.values())
    assert {tuple(response.token_ids) for response in lost.values()} <= {(4,), ()}  # what had come


def test_a_server_that_writes_nothing_hangs(fleet, servers, config):
    config.rollout.served.token_timeout = 1
    servers[0].fault = "hang"
    for key in range(2):
        fleet.send(key, 0, request())
    finished, lost = gather(fleet, finished=1, lost=1)
    assert fleet.members == [servers[1].address] and set(lost) | set(finished) == {(0, 0), (1, 0)}


def test_without_a_server_everything_is_lost(fleet, servers):
    for server in servers:
        server.fault = "die"
    fleet.send(0, 0, request())
    gather(fleet, lost=1)
    fleet.send(1, 0, request())
    gather(fleet, lost=1)
    fleet.send(2, 0, request())
    assert gather(fleet, lost=1)[1][2, 0].token_ids == [] and fleet.free == 0
    with pytest.raises(NoServer):
        fleet.token_logprobs([[1, 2]])


def test_what_is_given_up_is_not_heard_of(fleet, servers):
    for server in servers:
        server.gate.clear()
    fleet.send(0, 0, request())
    fleet.send(1, 0, request())
    until(lambda: all(response.token_ids for response in fleet.so_far().values()))
    assert {at: response.token_ids for at, response in fleet.so_far().items()} == {(0, 0): [4], (1, 0): [4]}
    fleet.abort([0])
    for server in servers:
        server.gate.set()
    finished, lost = gather(fleet, 1)
    assert set(finished) == {(1, 0)} and not lost and fleet.running() == 0


def test_sync_reaches_all_and_running_answers_go_on(fleet, servers):
    for server in servers:
        server.gate.clear()
    fleet.send(0, 0, request())
    until(lambda: fleet.so_far()[0, 0].token_ids)
    before = [list(server.calls) for server in servers]
    fleet.sync(weights(), 1, NAMES)
    for server, known in zip(servers, before):
        assert server.names == ["a", "b", "a", "b"] and server.version == "1"
        update = ["start_weight_update", "update_weights", "update_weights", "finish_weight_update"]
        assert server.calls[len(known) :] == ["collective_rpc", "pause", *update, "reset_prefix_cache", "resume"]
        server.gate.set()
    assert gather(fleet, 1)[0][0, 0].token_ids == [4, 5, 6, 7]


def test_versions_are_noted_on_arrival_where_the_server_knows_none(fleet, servers):
    """As with vLLM 0.26."""
    for server in servers:
        server.gate.clear()
    fleet.send(0, 0, request())
    until(lambda: fleet.so_far()[0, 0].token_ids)
    fleet.sync(weights(), 1, NAMES)
    for server in servers:
        server.version = None
        server.gate.set()
    response = gather(fleet, 1)[0][0, 0]
    assert response.weight_version == 0 and response.later_versions == [(1, 1)] and response.versions == [0, 1, 1, 1]


def test_a_server_that_fails_in_a_sync_is_left_out_and_comes_back_in_the_next(fleet, servers):
    servers[0].fault = "transfer"
    fleet.sync(weights(), 1, NAMES)
    assert fleet.members == [servers[1].address]
    servers[0].fault = None
    assert fleet.waiting()
    fleet.sync(weights(), 2, NAMES)
    assert sorted(fleet.members) == sorted(server.address for server in servers) and servers[0].version == "2"


def test_a_server_that_closes_idle_connections_is_not_taken_for_a_dead_one(fleet, servers):
    servers[0].fault = "idle"
    for version in (1, 2):
        fleet.sync(weights(), version, NAMES)
    assert len(fleet.members) == 2 and servers[0].version == "2"


def test_a_server_that_was_started_anew_is_not_taken_for_the_old_one(fleet, servers):
    """It has other weights, at the same address: nothing it would write could be used."""
    servers[0].stop()
    servers[0].start()
    calls = len(servers[0].calls)
    fleet.sync(weights(), 1, NAMES)
    assert fleet.members == [servers[1].address] and "update_weights" not in servers[0].calls[calls:]
    fleet.sync(weights(), 2, NAMES)
    assert len(fleet.members) == 2 and "init_weight_transfer_engine" in servers[0].calls[calls:]


def test_a_stream_that_leaves_tensors_out_is_refused(fleet):
    with pytest.raises(RuntimeError, match="1 tensors are missing from the weight stream, e.g. b"):
        fleet.sync(weights(["a"]), 1, NAMES)


def test_statistics(fleet, servers):
    fleet.statistics()
    fleet.send(0, 0, request())
    gather(fleet, 1)
    found = fleet.statistics()
    assert found["servers"] == 2 and found["server_0/running"] == found["server_1/running"] == 2
    assert found["server_0/preempted"] == 0, "those before the last call do not count"
    rates = [found["server_0/generated_tokens_per_second"], found["server_1/generated_tokens_per_second"]]
    assert min(rates) == 0 < max(rates) and 0 <= found["idle_share"] <= 1


@pytest.mark.parametrize(
    "described, message",
    [
        ({"model": {"vocab_size": 60}}, "serves another model: vocab_size is 60, not 50"),
        ({"max_model_len": 41}, "has max_model_len 41, not 40"),
        ({"logprobs_mode": "raw_logprobs"}, "has logprobs_mode raw_logprobs, not processed_logprobs"),
        ({"backend": "nccl"}, "has backend nccl, not megatron_nft_gloo"),
    ],
)
def test_a_server_of_another_run_is_refused(config, described, message):
    with FakeServer(**described) as server, pytest.raises(UserError, match=message):
        start(config, [server])


def test_another_programs_server_is_refused(config):
    handler = type("Nothing", (BaseHTTPRequestHandler,), {"do_GET": lambda own: own.send_error(404)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        config.rollout.served.addresses = [f"http://127.0.0.1:{other.server_port}"]
        with pytest.raises(UserError, match=f"http://127.0.0.1:{other.server_port} is no server of ours"):
            Fleet(config, MODEL, str, note=lambda _: None)
        other.shutdown()


def test_a_server_that_does_not_answer(config, servers):
    config.rollout.served.start_timeout = 1
    servers[1].stop()
    with pytest.raises(UserError, match=f"{servers[1].address} does not answer after 1 s: start `megatron-nft serve`"):
        start(config, servers)


def test_a_server_may_come_while_another_thread_goes_through_them(config, servers, fleet):
    going = iter(fleet._members.values())
    next(going)
    with FakeServer() as another:
        fleet._settings.addresses.append(another.address)
        assert fleet.waiting() and len(fleet._members) == 3
        next(going)


def test_an_address_of_something_else_is_refused(config, servers, monkeypatch):
    """What listens there knows no /health."""

    async def call(self, path, *_, **__):
        raise Refused(f"{self.address}/{path}: 404")

    monkeypatch.setattr(Remote, "call", call)
    with pytest.raises(UserError, match=f"{servers[0].address} is no server of ours"):
        start(config, servers[:1])


def test_a_server_of_another_run_that_comes_later_is_passed_over(config, servers, monkeypatch):
    """The run goes on with the servers it has, and tells of the stranger once."""
    monkeypatch.setattr(member, "open_link", FakeLink)
    notes, folder = [], Path(config.run_dir) / "servers"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"address": servers[0].address}))
    config.rollout.served.count = 1
    fleet = Fleet(config, MODEL, str, note=notes.append)
    with FakeServer(max_model_len=41) as stranger:
        (folder / "b.json").write_text(json.dumps({"address": stranger.address}))
        for version in range(2):
            fleet.sync(weights(), version, NAMES)
        assert not fleet.waiting()
    assert fleet.members == [servers[0].address]
    assert [note for note in notes if "passed over" in note] == [
        f"the server {stranger.address} has max_model_len 41, not 40: it is passed over"
    ]
    fleet.close()


def test_servers_are_found_by_their_files(config, servers):
    config.rollout.served.count = 2
    folder = Path(config.run_dir) / "servers"
    folder.mkdir()
    for name, server in zip("ab", servers):
        (folder / f"{name}.json").write_text(json.dumps({"address": server.address}))
    fleet = Fleet(config, MODEL, str, note=lambda _: None)
    assert fleet.members == [] and fleet.waiting()
    fleet.close()
    (folder / "b.json").unlink()
    config.rollout.served.start_timeout = 1
    with pytest.raises(UserError, match="1 of 2 servers are there after 1 s"):
        Fleet(config, MODEL, str, note=lambda _: None)

"""A real vLLM server that `megatron-nft serve` watches over, its weights over gloo, and its client."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from megatron_nft import config as configuration
from megatron_nft.config import Config
from megatron_nft.rollout import Request, serving
from megatron_nft.rollout.fleet import Fleet
from megatron_nft.trajectories import Response
from tests.end_to_end.test_engine import load, make_models, of_tokens, prompt, reference, weights_of
from tests.support import ROOT

TOLERANCE = 1e-5  # float32 sums in another order
SLOTS, LONG = 8, 250  # tokens: of answers that are still being written when the weights change


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """What is served at the start, and what comes later."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def config(models, tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("run")
    content = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(models[0]), "precision": "fp32"},
        "data": {"max_prompt_length": 40},
        "rollout": {"max_tokens": 260, "max_num_seqs": SLOTS, "cpu_kvcache_space": 1, "served": {"stream_interval": 4}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return configuration.load(folder / "config.yaml", [])


@pytest.fixture(scope="module")
def server(config) -> Iterator[subprocess.Popen]:
    """As srun starts it: with a place in a job that is none of the server's."""
    job = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1", "SLURM_PROCID": "5"}
    environment = os.environ | job | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    file = Path(config.run_dir).with_name("config.yaml")
    with open(file.with_name("server.log"), "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "megatron_nft", "serve", file], env=environment, stdout=log, stderr=log)
    yield process
    process.terminate()
    assert process.wait(60) == 0
    assert not serving.found(config.run_dir)


@pytest.fixture(scope="module")
def fleet(server, config) -> Iterator[Fleet]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    made = Fleet(config, json.loads(Path(config.model.path, "config.json").read_text()), tokenizer.decode)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def first_weights(fleet, models):
    sync(fleet, models[0], 0)


def sync(fleet: Fleet, model: Path, version: int) -> None:
    fleet.sync(weights_of(model), version, frozenset(name for name, _ in load(model).named_parameters()))
    assert len(fleet.members) == 1


def requests(count: int = 4, tokens: int = 40) -> list[Request]:
    return [Request(prompt(3 + i, seed=i), 1.0, 1.0, tokens, seed=1000 + i) for i in range(count)]


def answer(fleet: Fleet, asked: list[Request]) -> list[Response]:
    for key, request in enumerate(asked):
        fleet.send(key, 0, request)
    return collect(fleet, len(asked))


def collect(fleet: Fleet, count: int) -> list[Response]:
    found: dict[int, Response] = {}
    wait(lambda: found.update({key: response for key, _, response in fleet.poll()}) or len(found) == count)
    assert not fleet.lost()
    return [found[key] for key in range(count)]


def wait(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def expected(model: Path, request: Request, response: Response) -> torch.Tensor:
    """Log-probs of the answer's tokens by transformers."""
    ids = [*request.token_ids, *response.token_ids]
    return of_tokens(reference(model, ids), ids)[len(request.token_ids) - 1 :]


def assert_written_by(model: Path, request: Request, response: Response, tokens: slice = slice(None)) -> None:
    ours = torch.tensor(response.logprobs).double()[tokens]
    torch.testing.assert_close(ours, expected(model, request, response)[tokens], rtol=0, atol=TOLERANCE)


def test_answers_are_those_of_their_seeds_and_of_the_weights_that_were_sent(fleet, models):
    asked = requests()
    first, again = answer(fleet, asked), answer(fleet, asked[::-1])[::-1]
    assert [response.token_ids for response in first] == [response.token_ids for response in again]
    sync(fleet, models[1], 1)
    second = answer(fleet, asked)
    for request, before, after in zip(asked, first, second):
        assert_written_by(models[0], request, before)
        assert_written_by(models[1], request, after)
        assert (before.weight_version, after.weight_version) == (0, 1) and before.token_ids != after.token_ids
    ids = [*asked[0].token_ids, *second[0].token_ids]
    [scores] = fleet.token_logprobs([ids])
    torch.testing.assert_close(torch.tensor(scores).double(), of_tokens(reference(models[1], ids), ids), rtol=0, atol=TOLERANCE)


def test_answers_that_are_being_written_go_on_with_the_new_weights(fleet, models):
    """What they have so far stays, and is read again by the new weights: nothing that the old ones made is left in memory."""
    asked = requests(tokens=LONG)
    for key, request in enumerate(asked):
        fleet.send(key, 0, request)
    wait(lambda: sum(len(response.token_ids) > 5 for response in fleet.so_far().values()) >= 2)
    sync(fleet, models[1], 1)
    crossed = 0
    for request, response in zip(asked, collect(fleet, len(asked))):
        if response.later_versions is None:
            continue  # it had ended before
        crossed += 1
        [(first, version)] = response.later_versions
        assert (response.weight_version, version) == (0, 1) and 0 < first < len(response.token_ids)
        assert_written_by(models[0], request, response, slice(first))
        assert_written_by(models[1], request, response, slice(first, None))
    assert crossed, "all had ended: choose longer ones"


def test_a_killed_server_is_started_again_and_comes_back(fleet, models, config):
    [file] = serving.directory(config.run_dir).glob("*.json")
    assert file.stem.endswith("-5"), "named by its task"
    killed = json.loads(file.read_text())["pid"]
    asked = requests(SLOTS, tokens=LONG)
    for key, request in enumerate(asked):
        fleet.send(key, 0, request)
    os.kill(killed, signal.SIGKILL)
    finished: list[int] = []
    lost: list[int] = []

    def all_settled() -> bool:
        finished.extend(key for key, _, _ in fleet.poll())
        lost.extend(key for key, _, _ in fleet.lost())
        return len(finished) + len(lost) == SLOTS

    wait(all_settled)
    assert lost and sorted(finished + lost) == list(range(SLOTS)) and fleet.members == []
    wait(fleet.waiting)
    with pytest.raises(ProcessLookupError):  # no process of the one before
        os.killpg(killed, 0)
    sync(fleet, models[1], 4)
    response = answer(fleet, requests(1))[0]
    assert response.weight_version == 4
    assert_written_by(models[1], requests(1)[0], response)

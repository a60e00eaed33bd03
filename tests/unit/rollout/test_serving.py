"""The process that watches over a server: here over one that only says that it is well."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.rollout import serving
from tests.support import ROOT

WELL = """
import http.server, sys, subprocess
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
child = subprocess.Popen(["sleep", "600"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def config(tmp_path) -> Config:
    made = Config(run_dir=str(tmp_path))
    made.model.path = "some/model"
    return made


@pytest.fixture
def watched(config, monkeypatch) -> Iterator[serving.Server]:
    """A server with a child of its own, watched over in a thread."""
    monkeypatch.setattr(serving.Server, "command", lambda self: [sys.executable, "-c", WELL, str(self._port)])
    server, asked = serving.Server(config, "fp32"), []
    thread = threading.Thread(target=server.watch, args=(asked,))
    thread.start()

    def end() -> None:
        asked.append(signal.SIGTERM)
        thread.join(20)
        server.stop()

    server.end = end
    yield server
    end()


def until(found: Callable):
    """What found() gives once it is true."""
    end = time.monotonic() + 120
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def address(config: Config, other_than: str = "") -> str:
    return until(lambda: next((a for a in serving.found(config.run_dir).values() if a != other_than), ""))


def members(group: int) -> list[str]:
    """Processes of a group."""
    done = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(group)], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "Z" not in line]


def test_a_server_that_is_killed_is_started_again_and_leaves_nobody_behind(watched, config):
    first = address(config)
    leader = watched._process.pid
    assert len(until(lambda: len(members(leader)) == 2 and members(leader))) == 2
    os.kill(leader, signal.SIGKILL)
    assert address(config, other_than=first) != first
    assert not members(leader)


def test_a_client_can_ask_for_a_new_start_of_the_server_it_means(watched, config):
    first = address(config)
    [name] = serving.found(config.run_dir)
    serving.ask_for_restart(config.run_dir, name, "http://127.0.0.1:1")  # of one that is gone
    assert not list(serving.directory(config.run_dir).glob("*.restart"))
    leader = watched._process.pid
    serving.ask_for_restart(config.run_dir, name, first)
    assert address(config, other_than=first) != first and watched._process.pid != leader
    assert not list(serving.directory(config.run_dir).glob("*.restart"))


def test_the_end_takes_the_address_away(watched, config):
    address(config)
    leader = watched._process.pid
    watched.end()
    assert not serving.found(config.run_dir) and not members(leader)


def test_a_server_that_dies_again_and_again_is_given_up(config, monkeypatch, capfd):
    monkeypatch.setattr(serving.Server, "command", lambda self: [sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(UserError, match=r"the server \S+ ended 3 times in a row: see what it wrote above"):
        serving.Server(config, "fp32").watch([])
    assert capfd.readouterr().err.count("ended (exit code 3)") == 3


def test_a_host_of_another_machine_is_refused(config):
    config.rollout.served.host = "192.0.2.1"  # of documentation: nobody has it
    with pytest.raises(UserError, match="no server can listen on rollout.served.host '192.0.2.1'"):
        serving.Server(config, "fp32").watch([])


@pytest.mark.slow
def test_a_killed_watcher_takes_its_server_with_it(config):
    script = (
        "import sys; from megatron_nft.config import Config; from megatron_nft.rollout import serving\n"
        f"serving.Server.command = lambda self: [sys.executable, '-c', {WELL!r}, str(self._port)]\n"
        f"config = Config(run_dir={config.run_dir!r}); config.model.path = ''\n"
        "serving.Server(config, 'fp32').watch([])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    address(config)
    [pid] = [line.split()[0] for line in subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(process.pid)],
             capture_output=True, text=True).stdout.splitlines() if "python" in line]  # fmt: skip
    process.kill()
    process.wait()
    until(lambda: not members(int(pid)))


def test_a_server_knows_nothing_of_the_job_it_is_started_in(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    environment = serving._environment()
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_the_command_line_has_the_settings_of_an_engine(config, tmp_path):
    config.rollout.tensor_parallel_size, config.rollout.max_num_seqs, config.seed = 2, 7, 5
    words = serving.command_line(serving.arguments(config, "bf16"))
    expected = {
        "--model": "some/model",
        "--dtype": "bfloat16",
        "--tensor-parallel-size": "2",
        "--max-num-seqs": "7",
        "--seed": "5",
        "--max-model-len": "1024",
        "--load-format": "auto",
        "--logprobs-mode": "processed_logprobs",
        "--hf-overrides": '{"head_dtype": "float32"}',
    }
    assert {flag: words[words.index(flag) + 1] for flag in expected} == expected
    assert "--enable-scale-out" in words
    (tmp_path / "manifest.json").write_text("{}")
    config.model.path = str(tmp_path)
    assert serving.arguments(config, "fp32")["load_format"] == "dummy", "a checkpoint's weights come from the trainer"

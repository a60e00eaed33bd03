"""`megatron-nft serve`: one vLLM server, and the process that watches over it.

The server's address stands in run_dir/servers/<name>.json as long as it answers. Whoever finds that it hangs asks for a new start by
`ask_for_restart`, on the file system that both see.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import megatron_nft
from megatron_nft.config import Config, max_model_len
from megatron_nft.errors import UserError
from megatron_nft.rollout.arguments import check, command_line, engine_arguments
from megatron_nft.rollout.settings import set_environment
from megatron_nft.rollout.wire import backend
from megatron_nft.weights import load_weights

MODEL = "policy"  # the served model's name
STEADY = 60.0  # seconds that a server answers until its earlier deaths are forgotten
PATIENCE = 20.0  # seconds from SIGTERM to SIGKILL
# What launchers tell the processes of a job about their place in it: the server is a job of its own.
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")


def serve(config: Config, precision: str) -> None:
    """Run a server until SIGTERM or SIGINT asks to end; start it again where it dies.

    precision is "fp32", "bf16" or "fp16". Raises UserError where there is no model, and where the server dies rollout.served.max_deaths
    times in a row.
    """
    load_weights(config.model.path)
    check(config.rollout)
    set_environment(config.rollout)
    server = Server(config, precision)
    with _asked_to_end() as asked:
        try:
            server.watch(asked)
        finally:
            server.stop()


def server_name() -> str:
    """Of the server that this process watches over, unique in a run: the node, and the task of srun or the process."""
    return f"{socket.gethostname()}-{os.environ.get('SLURM_PROCID', os.getpid())}"


def directory(run_dir: str | Path) -> Path:
    """Where the servers of a run write their addresses."""
    return Path(run_dir) / "servers"


def found(run_dir: str | Path) -> dict[str, str]:
    """{name: address} of the servers that answer, as they say themselves."""
    files = sorted(directory(run_dir).glob("*.json"))
    return {file.stem: json.loads(text)["address"] for file in files if (text := _read(file))}


def ask_for_restart(run_dir: str | Path, name: str, address: str) -> None:
    """Let the process that watches over the server at an address end it and start it anew. One that has ended by itself is none of that."""
    if found(run_dir).get(name) == address:
        (directory(run_dir) / f"{name}.restart").write_text(address)


class Server:
    """A vLLM server as a child process in a session of its own, so that all of its processes can be ended together."""

    def __init__(self, config: Config, precision: str):
        self._config, self._precision = config, precision
        self._settings, self._name = config.rollout.served, server_name()
        self._file = directory(config.run_dir) / f"{self._name}.json"
        self._process: subprocess.Popen | None = None
        self._guard: subprocess.Popen | None = None
        self._port, self._since, self._address = 0, None, ""  # since: when it began to answer

    def watch(self, asked: list[int]) -> None:
        """Start the server, and start it again where it ends, until a signal's number is in `asked`."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        deaths = 0
        self._start()
        while not asked:
            time.sleep(0.2)
            if self._process.poll() is None and not self._restart_wanted():
                self._look_after()
                continue
            deaths = 1 if self._since is not None and time.monotonic() - self._since > STEADY else deaths + 1
            self._say(f"ended ({_reason(self._process.poll())}), {deaths} time{'s' * (deaths > 1)} in a row")
            self.stop(patience=0.0)
            if deaths >= self._settings.max_deaths:
                raise UserError(f"the server {self._name} ended {deaths} times in a row", "see what it wrote above, and mend that")
            self._start()

    def stop(self, patience: float = PATIENCE) -> None:
        """End the server and every process of it, and take its address away."""
        for file in (self._file, self._file.with_suffix(".restart")):
            file.unlink(missing_ok=True)
        if self._process is None:
            return
        if self._process.poll() is None and patience:
            self._process.terminate()
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._say(f"did not end within {patience:.0f} s, and is killed")
        _kill_group(self._process.pid)
        self._process.wait()
        self._guard.kill()
        self._guard.wait()
        self._guard.stdin.close()
        self._process = None

    def _start(self) -> None:
        self._port, self._since = self._settings.port or _free_port(self._settings.host), None
        self._process = subprocess.Popen(self.command(), env=_environment(), start_new_session=True)
        # Ends what is left of the server where this process is killed: its end of the pipe closes then.
        line = f"read _; kill -s KILL -- -{self._process.pid}"
        self._guard = subprocess.Popen(["/bin/sh", "-c", line], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def _look_after(self) -> None:
        """Write the address once the server answers."""
        if self._since is None and _answers(f"http://{_reachable(self._settings.host, local=True)}:{self._port}/health"):
            self._since = time.monotonic()
            self._address = f"http://{_reachable(self._settings.host)}:{self._port}"
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({"address": self._address, "pid": self._process.pid, "model": self._config.model.path}) + "\n")
            os.replace(part, self._file)
            self._say(f"answers at {self._address}")

    def _restart_wanted(self) -> bool:
        """Whether a client asked for a new start of this server, and not of the one before it."""
        return self._since is not None and self._address == _read(self._file.with_suffix(".restart"))

    def _say(self, what: str) -> None:
        print(f"megatron-nft: server {self._name} {what}", file=sys.stderr, flush=True)

    def command(self) -> list[str]:
        """The server's command line."""
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command_line(arguments(self._config, self._precision)),
                "--host", self._settings.host, "--port", str(self._port)]  # fmt: skip


def arguments(config: Config, precision: str) -> dict[str, Any]:
    """The server's settings, under vLLM's names: those of any engine that samples for training, and what serving needs."""
    return {
        **engine_arguments(config.rollout, config.model.path, max_model_len(config), precision, config.seed),
        "served_model_name": MODEL,
        "stream_interval": config.rollout.served.stream_interval,
        "enable_scale_out": True,
        "disable_uvicorn_access_log": True,
        "weight_transfer_config": {"backend": backend()},
        "worker_extension_cls": "megatron_nft.rollout.transfer.Extension",
    }


def _environment() -> dict[str, str]:
    """For the server: this process's, without its place in a job, and with this package."""
    kept = {k: v for k, v in os.environ.items() if k not in OF_LAUNCHERS and not k.startswith("TORCHELASTIC_")}
    root = str(Path(megatron_nft.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": path}


@contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """The signals that have come, while the block lasts."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_group(leader: int) -> None:
    """End all processes of the session that `leader` leads, whether or not it lives."""
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(leader, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _reachable(host: str, local: bool = False) -> str:
    """The name under which others, or this node itself, reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if local else socket.gethostname()
    return host


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise UserError(
                f"no server can listen on rollout.served.host {host!r}: {error.strerror}", "use an address of this machine"
            ) from None
        return probe.getsockname()[1]


def _read(file: Path) -> str:
    """A file's text; empty where it has just been taken away."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _reason(code: int | None) -> str:
    if code is None:
        return "a client found that it hangs"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

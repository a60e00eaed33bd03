"""torch.profiler's trace of a piece of work, as a table of kernels by kind: where the time went."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

# The first kind of which a pattern is in the kernel's name; names are those of cuBLAS (nvjet, gemm), cuDNN, FlashAttention,
# Transformer Engine, Triton and torch, and on a CPU of torch's operators.
KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|cudnn_generated"),
    ("optimizer", r"adam|multi_tensor|l2norm|unscale|clip_grad"),
    ("FP8 casts and transposes", r"fp8|float8|cast_transpose|transpose_kernel|quantize|compute_amax|amax_kernel|blockwise_scal|block_scal"),
    ("matrix products", r"gemm|nvjet|xmma|cutlass|cublas|splitk|gemv|matmul|aten::(add)?b?mm|aten::linear"),
    ("communication", r"nccl|gloo"),
    ("norms", r"norm"),
    ("copies", r"memcpy|memset|copy|catarray|fill|scatter|gather|index|aten::(cat|zeros|zero_|empty|to|_to_copy|clone|contiguous)"),
)
OTHER, IDLE = "elementwise and reductions", "idle, gaps between launches"
SHOWN = 15  # kernels by name


@dataclass(frozen=True)
class Table:
    """found: {"span_seconds", "kinds": {kind: seconds}, "kernels": [{"name", "kind", "seconds", "count"}]}; text: the same to be read."""

    found: dict
    text: str


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), OTHER)


def profiled(work: Callable[[], object]) -> Table:
    """Run `work` twice under torch.profiler, whose first time is slow, and take the second. On a GPU kernels and copies count, and the
    host is not watched, which would hold it up; on a CPU operators count, without those they call."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
            work()
            if gpu:
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return table_of(device_work(events) if gpu else operators(events))


def device_work(events: Iterable[dict]) -> list[dict]:
    """What ran on the GPU."""
    return [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def operators(events: Iterable[dict]) -> list[dict]:
    """What ran on the CPU, each operator with `own`: its time without that of the operators it called."""
    found = [e | {"own": e["dur"]} for e in events if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    found.sort(key=lambda e: (str(e["tid"]), e["ts"], -e["dur"]))
    callers: list[dict] = []
    for event in found:
        while callers and (callers[-1]["tid"] != event["tid"] or callers[-1]["ts"] + callers[-1]["dur"] <= event["ts"]):
            callers.pop()
        if callers:
            callers[-1]["own"] -= event["dur"]
        callers.append(event)
    return found


def table_of(events: list[dict]) -> Table:
    """Events of a trace (microseconds) by kind and by name. Idle is the time in which none of them ran: what runs at once counts in each
    kind, so that kinds and idle may be more than the whole."""
    seconds, names, counts = Counter(), Counter(), Counter()
    for event in events:
        name, took = event["name"], event.get("own", event["dur"]) / 1e6
        seconds[kind_of(name)] += took
        names[name] += took
        counts[name] += 1
    span = (max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)) / 1e6 if events else 0.0
    seconds[IDLE] = max(span - covered(events) / 1e6, 0.0)
    top = [{"name": n, "kind": kind_of(n), "seconds": s, "count": counts[n]} for n, s in names.most_common(SHOWN)]
    found = {"span_seconds": span, "kinds": dict(seconds.most_common()), "kernels": top, "launches": sum(counts.values())}
    return Table(found, _text(found))


def covered(events: list[dict]) -> float:
    """Microseconds in which at least one of the events ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        total += max(stop - max(event["ts"], end), 0.0)
        end = max(end, stop)
    return total


def _text(found: dict) -> str:
    span = found["span_seconds"]
    lines = [f"{'kind':<32}{'ms':>10}{'share':>8}   of {span * 1e3:.1f} ms, {found['launches']:,} launches"]
    lines += [f"{kind:<32}{s * 1e3:>10.2f}{s / span if span else 0:>8.1%}" for kind, s in found["kinds"].items()]
    lines.append(f"{'kernel':<32}{'ms':>10}{'count':>8}   kind")
    lines += [f"{k['name'][:100]}\n{'':<32}{k['seconds'] * 1e3:>10.2f}{k['count']:>8}   {k['kind']}" for k in found["kernels"]]
    return "\n".join(lines)

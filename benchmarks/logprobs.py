"""Time and memory of a token-level loss from hidden states and a head of 152,064 tokens: the plain way, ours in both forms, Liger's.

    .venv/bin/python benchmarks/logprobs.py [--tokens 4096 8192] [--ours 32768] [--liger DIRECTORY] [--out FILE.json]

Float32 on the CPU, hidden 1,024. All ways make the loss of DAPO's objective and the gradients of hidden and weight. plain: full logits,
log_softmax, autograd. one pass and recomputing: megatron_nft.policy.logprobs. liger: LigerFusedLinearGRPOLoss of liger_kernel.chunked_loss,
with loss_type "dapo" and without torch.compile, in answers of 1,024 tokens; it is left out where liger_kernel is not installed (--liger:
a directory that holds it, e.g. by `.venv/bin/python -m pip install --no-deps --target build/liger liger-kernel==0.8.5`). Each way runs
once, in a process of its own, one after the other.

peak: the most that was resident while it ran, beyond inputs, weight and the weight's gradient. (Of the plain way the gradient is not yet
there when most is, so its figure is too small by up to the gradient's size, and our share of it too large.) Where the plain way
is not run, its figures are estimates: proportional to the tokens, from the most tokens it was run with. Other programs on the same
cores spoil the seconds, and less so the seconds of CPU: both are printed, with the load average. With one thread (OMP_NUM_THREADS=1)
the two are the same on a machine of one's own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
VOCAB, HIDDEN, ANSWER = 152_064, 1024, 1024
WAYS = ("plain", "one pass", "recomputing", "liger")
TARGETS = {"one pass": (1.0, 0.1), "recomputing": (1.4, 0.1)}  # most seconds and peak, as shares of the plain way's
CLIP = 0.2, 0.28


def inputs(tokens: int) -> tuple:
    """hidden [tokens, HIDDEN], weight [VOCAB, HIDDEN], targets, advantages [tokens]: one advantage an answer."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=g)
    weight = torch.randn(VOCAB, HIDDEN, generator=g).mul_(0.03)
    advantages = torch.randn(tokens // ANSWER, generator=g).repeat_interleave(ANSWER)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, VOCAB, (tokens,), generator=g), advantages


def objective(advantages: torch.Tensor):
    """DAPO's loss by megatron_nft.objectives, on the first update: pi_old = pi. As logprobs.fused_loss takes it."""
    from megatron_nft import objectives
    from megatron_nft.config import ObjectiveConfig

    settings = ObjectiveConfig("dapo", clip_ratio_low=CLIP[0], clip_ratio_high=CLIP[1])

    def loss_of(values, _, part):
        one, a = torch.ones_like(values), advantages[part]
        scale, index = one / len(advantages), torch.zeros(len(a), dtype=torch.int64)
        return objectives.loss(objectives.Inputs(values, values.detach(), one, one, a, scale, one, one, index), settings)

    return loss_of


def run(way: str, hidden, weight, targets, advantages) -> list[torch.Tensor]:
    """The loss and the gradients of hidden and weight, one way."""
    from megatron_nft.policy import logprobs

    if way == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss_fn = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", epsilon_low=CLIP[0], epsilon_high=CLIP[1]
        )
        answers = len(targets) // ANSWER
        loss, _ = loss_fn(
            hidden.view(answers, ANSWER, HIDDEN), weight, targets.view(answers, ANSWER), torch.ones(answers, ANSWER), advantages[::ANSWER]
        )
    elif way == "plain":
        table = (hidden @ weight.T).log_softmax(-1)
        loss, _ = objective(advantages)(table.gather(1, targets[:, None])[:, 0], None, slice(None))
        del table
    elif way == "one pass":
        loss, _ = logprobs.fused_loss(hidden, logprobs.Head(weight, VOCAB), targets, objective(advantages))
    else:
        values, _ = logprobs.logprobs(hidden, logprobs.Head(weight, VOCAB), targets)
        loss, _ = objective(advantages)(values, None, slice(None))
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measure(way: str, tokens: int) -> dict:
    """Run one way in this process."""
    given = inputs(tokens)
    small = [x.detach()[:256].requires_grad_() for x in given[:2]]
    run(way if way != "liger" else "plain", small[0], small[1], given[2][:256] % 256, given[3][:256])  # imports, threads, buffers
    load = os.getloadavg()[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, started, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    loss, d_hidden, d_weight = run(way, *given)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = memory("VmHWM") - before - d_weight.nbytes
    norms = [x.norm().item() for x in (d_hidden, d_weight)]
    return {"way": way, "tokens": tokens, "seconds": seconds, "cpu": cpu, "peak": peak, "load": load, "loss": loss.item(),
            "norms": norms}  # fmt: skip


def measure_apart(way: str, tokens: int, liger: str | None) -> dict:
    """Run one way in a process of its own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), liger)))
    command = [sys.executable, __file__, "--one", way, str(tokens)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{way} at {tokens} tokens failed with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def have_liger(liger: str | None) -> bool:
    """Whether the Python of the measurements can import liger_kernel.chunked_loss."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), liger)))
    command = [sys.executable, "-c", "import liger_kernel.chunked_loss"]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL).returncode == 0


def show(found: dict, plain: dict) -> None:
    """One line: the figures, and the shares of the plain way's."""
    time_limit, peak_limit = TARGETS.get(found["way"], (None, None))
    ratios = [found[key] / plain[key] for key in ("seconds", "cpu", "peak")]
    told = [f"{ratio:.3f}" + _verdict(ratio, limit) for ratio, limit in zip(ratios, (time_limit, time_limit, peak_limit), strict=True)]
    measured = f"{found['seconds']:>8.1f} s {found['cpu']:>8.1f} s CPU {found['peak'] / 2**30:>7.3f} GiB  load {found['load']:>4.1f}"
    print(f"{found['tokens']:>6} {found['way']:<16}{measured}  to plain: {', '.join(told)}", flush=True)


def _verdict(ratio: float, limit: float | None) -> str:
    return "" if limit is None else f" ({'within' if ratio <= limit else 'ABOVE'} {limit})"


def check_equal(found: dict, plain: dict) -> None:
    """The loss to 1e-5, the norms of the gradients to 1e-4 relative: the ways did the same work."""
    far = [abs(a - b) > 1e-4 * b for a, b in zip(found["norms"], plain["norms"], strict=True)]
    if abs(found["loss"] - plain["loss"]) > 1e-5 or any(far):
        raise SystemExit(f"{found['way']} differs from the plain way: {found} {plain}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192], help="of every way")
    parser.add_argument("--ours", type=int, nargs="*", default=[32768], help="of our forms only")
    parser.add_argument("--liger", help="a directory that holds liger_kernel")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]))))
        return
    ways = [way for way in WAYS if way != "liger" or have_liger(given.liger)]
    print(f"{torch.__version__}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads, float32, vocabulary {VOCAB}, hidden {HIDDEN}")
    found, plain = [], None
    for tokens in given.tokens:
        for way in ways:
            found.append(measure_apart(way, tokens, given.liger))
            plain = found[-1] if way == "plain" else plain
            show(found[-1], plain)
            check_equal(found[-1], plain)
    for tokens in given.ours if plain else ():
        scaled = {key: plain[key] * tokens / plain["tokens"] for key in ("seconds", "cpu", "peak")}
        show({**scaled, "way": "plain (estimate)", "tokens": tokens, "load": plain["load"]}, scaled)
        for way in TARGETS:
            found.append(measure_apart(way, tokens, given.liger))
            show(found[-1], scaled)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

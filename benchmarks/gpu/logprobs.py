"""Log-probs of a large vocabulary and their gradient on one GPU: our two forms beside the plain way and Liger's fused losses.

    python benchmarks/gpu/logprobs.py [--tokens 32768] [--hidden 5120] [--vocab 152064] [--chunks N ...] [--json FILE] [--tiny]

BF16 operands (float32 on a CPU). Every way makes the sum of the targets' log-probs and the gradients of hidden states and head. plain:
logits in BF16, made float32, log_softmax, autograd. one pass and recomputing: megatron_nft.policy.logprobs, also with --chunks tokens in
the buffer at a time. Liger: LigerFusedLinearCrossEntropyLoss, which rounds logits to BF16, with the head's gradient summed over its chunks
in BF16 (its default) and in float32, as ours is; left out where liger_kernel is not installed.
extra_bytes: the most in use beyond hidden states, weight, targets and both gradients. Where the plain way does not fit, all ways are
measured at half the tokens, and so on; the rows say at how many.
"""

import argparse
from collections.abc import Callable
from functools import partial

import common
import torch

from megatron_nft.policy.logprobs import CHUNK_BYTES, Head, fused_loss, logprobs

FORMS = {"one pass": 1.0, "recomputing": None}  # most time beside the plain way's
MOST_MEMORY, BESIDE_LIGER = 0.1, 1.1


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=60)
    parser.add_argument("--tokens", type=common.positive, default=32768)
    parser.add_argument("--hidden", type=common.positive, default=5120)
    parser.add_argument("--vocab", type=common.positive, default=152064)
    parser.add_argument(
        "--chunks", type=common.positive, nargs="*", default=[512, 2048, 4096, 8192], help="tokens in the buffer, beside the default"
    )
    parser.add_argument("--repeats", type=common.positive, default=5)
    return parser.parse_args()


def one_pass(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    return fused_loss(hidden, Head(weight, len(weight)), targets, lambda values, *_: (values.sum(), {}), chunk=chunk)[0]


def recomputing(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    return logprobs(hidden, Head(weight, len(weight)), targets, chunk=chunk)[0].sum()


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).sum()


def liger_ways() -> dict[str, Callable]:
    """Liger's, where its kernels can run."""
    if not torch.cuda.is_available():
        return {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Loss
    except ModuleNotFoundError:
        return {}

    def way(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **settings) -> torch.Tensor:
        return -Loss(reduction="sum", **settings)(weight, hidden, targets)

    return {"Liger": way, "Liger, float32 sums": partial(way, accum_dtype=torch.float32)}


def ways(chunks: list[int], tokens: int) -> dict[str, Callable]:
    found = {"plain": plain, "one pass": one_pass, "recomputing": recomputing, **liger_ways()}
    for chunk in chunks:
        if chunk < tokens:
            found[f"one pass, chunks of {chunk}"] = partial(one_pass, chunk=chunk)
    return found


def inputs(tokens: int, hidden: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden states [tokens, hidden], weight [vocab, hidden], targets [tokens]."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    g = torch.Generator(device).manual_seed(0)
    states = torch.randn(tokens, hidden, device=device, dtype=dtype, generator=g)
    weight = torch.randn(vocab, hidden, device=device, dtype=dtype, generator=g).mul_(hidden**-0.5)
    return states.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocab, (tokens,), device=device, generator=g)


def measure_way(way: Callable, given: tuple, repeats: int, budget: common.Budget) -> dict:
    """Forward and backward."""
    hidden, weight, targets = given
    made: dict[str, torch.Tensor] = {}

    def work() -> None:
        hidden.grad = weight.grad = None
        loss = way(hidden, weight, targets)
        loss.backward()
        made["loss"] = loss.detach()

    seconds, peak = common.timed(work, repeats, budget=budget)
    # a CPU's figure is of the whole process: there it says nothing
    beyond = peak - sum(t.nbytes for t in (hidden, weight, targets, hidden.grad, weight.grad)) if torch.cuda.is_available() else None
    norms = {f"{name}_norm": tensor.grad.float().norm().item() for name, tensor in (("hidden", hidden), ("weight", weight))}
    hidden.grad = weight.grad = None
    return {"seconds": seconds, "peak_bytes": peak, "extra_bytes": beyond, "loss": made["loss"].item(), **norms}


def measure_all(arguments: argparse.Namespace, tokens: int, budget: common.Budget) -> list[dict]:
    """A row of each way; the plain one's alone where it does not fit."""
    given, rows = inputs(tokens, arguments.hidden, arguments.vocab), []
    for name, way in ways(arguments.chunks, tokens).items():
        of = {"way": name, "tokens": tokens, "hidden": arguments.hidden, "vocab": arguments.vocab}
        if not budget.left and rows:
            rows.append(of | common.NO_TIME)
            continue
        rows.append(common.row(of, lambda way=way: measure_way(way, given, arguments.repeats, budget)))
        print(line(rows[-1]), flush=True)
        if name == "plain" and "error" in rows[-1]:
            break
        common.free()
    return rows


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['way']:<28}{row['tokens']:>7} tokens  {row['error']}"
    beyond = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**30:>9.2f} GiB beyond inputs and gradients"
    return f"{row['way']:<28}{row['tokens']:>7} tokens  {row['seconds'] * 1e3:>9.1f} ms{beyond}  loss {row['loss']:.6g}"


def ratios(rows: list[dict]) -> list[dict]:
    """Of the rows of one number of tokens."""
    by_name = {row["way"]: row for row in rows}
    base, found = by_name.get("plain"), []
    for form, most in FORMS.items():
        own, at = by_name.get(form), f"{form}, {rows[0]['tokens']} tokens"
        found.append(common.ratio(f"{at}: time to the plain way", common.quotient(own, base, "seconds"), most and f"<= {most}"))
        found.append(common.ratio(f"{at}: memory to the plain way", common.quotient(own, base, "extra_bytes"), f"<= {MOST_MEMORY}"))
    for liger in ("Liger, float32 sums", "Liger"):
        same = liger != "Liger"  # the other one sums in BF16, which costs less and is less exact
        time, memory = (common.quotient(by_name.get("one pass"), by_name.get(liger), key) for key in ("seconds", "extra_bytes"))
        found.append(common.ratio(f"one pass: time to {liger}", time, f"<= {BESIDE_LIGER}" if same else None))
        found.append(common.ratio(f"one pass: memory to {liger}", memory, "<= 1" if same else None))
    tried = [row for row in rows if row["way"].startswith("one pass") and "seconds" in row]
    if tried and base:
        best = min(tried, key=lambda row: row["seconds"])
        found.append(common.ratio(f"fastest: {best['way']}: time to the plain way", common.quotient(best, base, "seconds")))
        found.append(common.ratio(f"fastest: {best['way']}: memory to the plain way", common.quotient(best, base, "extra_bytes")))
    return found


def main() -> None:
    arguments = parse()
    budget, tokens, rows = common.budget_of(arguments), arguments.tokens, []
    if arguments.tiny:
        tokens, arguments.hidden, arguments.vocab, arguments.chunks, arguments.repeats = 256, 32, 1000, [64], 1
    print(f"hidden {arguments.hidden}, vocabulary {arguments.vocab}; the default chunk is {CHUNK_BYTES // (4 * arguments.vocab)} tokens")
    while tokens:
        latest = measure_all(arguments, tokens, budget)
        rows, tokens = rows + latest, tokens // 2 if "error" in latest[0] else 0
        common.free()
    common.finish("logprobs", rows, ratios(latest), arguments.json)


if __name__ == "__main__":
    main()

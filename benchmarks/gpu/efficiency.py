"""What the GPU at hand reaches of its data sheet, for the planner: an entry that `plan.measured=FILE` takes in place of published shares.

    python benchmarks/gpu/efficiency.py --json FILE [--seconds 60] [--tiny]
    torchrun --nproc-per-node N benchmarks/gpu/efficiency.py --json FILE      the all-reduce over N ranks, too

Matrix products in BF16 and FP8 (tensorwise: torch._scaled_mm, cuBLASLt as Transformer Engine calls it) at the shapes of the presets'
layers, forward and both gradients, and small ones that leave tiles of the last wave idle; attention over packed sequences of several
lengths by the module that training uses, forward and backward; streaming kernels; products of few rows, as decoding has them; copies to and
from pinned host memory; the start of a kernel. Each figure is what makes the planner's own formula (megatron_nft/planner/kernels.py) give
the measured time, so that what the formula says of small products and short sequences is not counted twice. --tiny shows on a CPU that the
script runs; its figures are of no GPU, and the planner refuses them.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import common
import figures
import torch

from megatron_nft import policy
from megatron_nft.config import Config, load
from megatron_nft.planner import kernels, models
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.hardware import GPUS, Gpu, known
from megatron_nft.planner.training_time import Training
from megatron_nft.policy import devices, machine, model
from megatron_nft.policy.context import Places

# sizes: of a preset its example, rows of a micro-batch, overrides
PRESETS = {
    "7B, TP1": ("qwen2.5_math_7b", "Qwen2.5-Math-7B", 4096, "parallel.tensor_model_parallel_size=1"),
    "32B, TP8": ("qwen2.5_32b", "Qwen2.5-32B", 16384, "parallel.tensor_model_parallel_size=8"),
    "32B, TP1": ("qwen2.5_32b", "Qwen2.5-32B", 16384, "parallel.tensor_model_parallel_size=1 parallel.sequence_parallel=false"),
}
DEPTH = 5120  # of small products, and of those of few rows
HEADS = {"7B, TP1": (28, 4), "32B, TP8": (5, 1)}  # query heads, key and value heads, of 128 channels
LENGTHS, TOKENS = (1024, 2048, 4096, 8192, 16384), 16384
FEW_ROWS, WIDE, COPIES = (1, 8, 32, 64, 128, 256), 13824, 4  # weights of several layers in turn: none stays in the cache
STREAMED = 2**30  # bytes of an operand
LAUNCHES = 2000


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    products: dict[str, list[tuple[int, int, int]]]  # rows, columns, depth, by where they are from
    small: list[tuple[int, int, int]]
    heads: dict[str, tuple[int, int]]
    lengths: tuple[int, ...]
    tokens: int
    few_rows: tuple[int, ...]
    weight: tuple[int, int]  # columns, depth
    streamed: int
    launches: int
    long: float = 0.03  # seconds of a timed run, at least: what is shorter is repeated within it

    @classmethod
    def of(cls, gpu: Gpu, tiny: bool) -> "Sizes":
        if tiny:
            tiles = [(128, 256, 64), (200, 256, 64)]
            return cls({"tiny": [(64, 96, 32)]}, tiles, {"tiny": (4, 2)}, (32, 64, 128), 128, (1, 4), (96, 64), 2**20, 20, 0.0)
        waves = gpu.processors
        small = [(kernels.TILE[0] * tiles, kernels.TILE[1], DEPTH) for tiles in (waves // 2, waves, waves + 1, 2 * waves, 2 * waves + 1)]
        return cls(dict(_of_presets()), small, HEADS, LENGTHS, TOKENS, FEW_ROWS, (WIDE, DEPTH), STREAMED, LAUNCHES)


def _of_presets() -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    for name, (folder, published, rows, overrides) in PRESETS.items():
        config = load(common.ROOT / "examples" / folder / "nft.yaml", [f"model.path={published}", *overrides.split()])
        products = Training(config, models.find(published).hf, Cluster.of(config)).products(rows)
        yield name, [tuple(map(int, product)) for product in products]


def main() -> None:
    arguments = common.parser(__doc__, seconds=60).parse_args()
    name = known(common.device())
    gpu = GPUS[name or "H100"]  # of what is no GPU here the shares are of H100's sheet, and say nothing
    sizes, first = Sizes.of(gpu, arguments.tiny), int(os.environ.get("RANK", "0")) == 0
    config, meter = Config(run_dir="unused"), Meter(common.Budget(arguments.seconds), sizes.long)
    policy.initialize(config.parallel, config.seed)
    rows = list(exchange(gpu))
    if first:
        for measure in (products, small_products, attention, few_rows, streams, host_copies, launches):
            for row in measure(sizes, meter, config):
                rows.append(row)
                print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        found = figures.figures(gpu, rows)
        ratios = figures.ratios(gpu, found, rows)
        entry = {"gpu": name, "tiny": arguments.tiny, "figures": found}
        common.finish("efficiency", rows, ratios, arguments.json, **entry)
        print(json.dumps(entry["figures"]))
    policy.gathered([0.0])  # the others wait for the first
    policy.shutdown()


@dataclass(frozen=True)
class Meter:
    """Times rows as long as there is time."""

    budget: common.Budget
    long: float  # as Sizes has it

    def told(self, row: dict, make: Callable[[], Callable[[], object]]) -> dict:
        """The row with the seconds of what `make` makes; or why there are none."""
        if not self.budget.left:
            return row | common.NO_TIME
        found = common.row(row, lambda: {"seconds": self._seconds(make())})
        common.free()
        return found

    def _seconds(self, work: Callable[[], object]) -> float:
        """Median of a call, in runs of `long` seconds or more."""
        once = common.timed(work, repeats=1, warm_up=2)[0]
        calls = max(1, min(1000, int(self.long / max(once, 1e-7))))

        def run() -> None:
            for _ in range(calls):
                work()

        return common.timed(run, repeats=3, warm_up=1, budget=self.budget)[0] / calls


def where() -> dict:
    """Where tensors are made, and their dtype."""
    gpu = torch.cuda.is_available()
    return {"device": "cuda" if gpu else "cpu", "dtype": torch.bfloat16 if gpu else torch.float32}


# ---- matrix products


def fp8_here() -> bool:
    return not torch.cuda.is_available() or not machine.fp8_fault("tensorwise")


def product(m: int, n: int, k: int) -> Callable[[], object]:
    """[m, k] x [k, n], the second operand as a linear layer keeps it: [n, k]."""
    a, b = torch.randn(m, k, **where()), torch.randn(n, k, **where())
    return lambda: a @ b.T


def product_fp8(m: int, n: int, k: int, fast: bool) -> Callable[[], object]:
    """The same of FP8 operands with one scale each. fast: sums in the tensor cores alone, as Transformer Engine has it forward."""
    device = where()["device"]
    a, b = (torch.randn(size, k, device=device).to(torch.float8_e4m3fn) for size in (m, n))
    one = torch.ones((), device=device)
    return partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)


def products(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    """Of layers: the product itself, and those of the gradients of its input and its weight."""
    for name, shapes in sizes.products.items():
        for m, n, k in shapes:
            for direction, (rows, columns, depth) in {"forward": (m, n, k), "input": (m, k, n), "weight": (k, n, m)}.items():
                row = {"kind": "product", "of": name, "direction": direction, "rows": rows, "columns": columns, "depth": depth}
                yield meter.told(row | {"fp8": False}, partial(product, rows, columns, depth))
                if fp8_here():
                    yield meter.told(row | {"fp8": True}, partial(product_fp8, rows, columns, depth, direction == "forward"))


def small_products(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    for m, n, k in sizes.small:
        row = {"kind": "small product", "rows": m, "columns": n, "depth": k, "fp8": False}
        yield meter.told(row, partial(product, m, n, k))


def few_rows(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    """One answer's tokens, or some answers', by the weights of several layers in turn."""
    columns, depth = sizes.weight
    weights = [torch.randn(columns, depth, **where()) for _ in range(COPIES)]
    nbytes = COPIES * weights[0].nbytes
    for rows in sizes.few_rows:
        hidden = torch.randn(rows, depth, **where())

        def work(hidden=hidden) -> None:
            for weight in weights:
                hidden @ weight.T

        yield meter.told({"kind": "few rows", "rows": rows, "weights": COPIES * columns * depth, "bytes": nbytes}, lambda work=work: work)


# ---- attention


def core_attention(heads: int, groups: int, config: Config):
    """The module that a layer of training attends with, taken from such a layer."""
    hf = common.COMMON | {"hidden_size": 128 * heads, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": heads,
                          "num_key_value_heads": groups, "vocab_size": 512, "tie_word_embeddings": True, "head_dim": 128}  # fmt: skip
    [module] = model.build(hf, config)
    return module.decoder.layers[0].self_attention.core_attention


def attention(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    """Forward alone, and with backward: its own time is the difference."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    for name, (heads, groups) in sizes.heads.items():
        core = core_attention(heads, groups, config)
        query, key, value = (torch.randn(sizes.tokens, count, 128, requires_grad=True, **where()) for count in (heads, groups, groups))
        push = torch.randn(sizes.tokens, heads * 128, **where())
        for length in sizes.lengths:
            bounds = torch.arange(0, sizes.tokens + 1, length, dtype=torch.int32, device=query.device)
            packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=length, max_seqlen_kv=length)
            packed.places = Places(bounds, None)

            def forward(packed=packed, core=core, q=query, k=key, v=value):
                return core(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)

            def both(forward=forward, q=query, k=key, v=value, push=push) -> None:
                torch.autograd.grad(forward().flatten(1), (q, k, v), push)

            row = {"kind": "attention", "of": name, "module": type(core).__name__, "length": length,
                   "squares": sizes.tokens * length, "channels": heads * 128}  # fmt: skip
            ahead = meter.told(row | {"backward": False}, lambda forward=forward: forward)
            whole = meter.told(row | {"backward": True}, lambda both=both: both)
            yield ahead
            yield whole | ({"seconds": whole["seconds"] - ahead["seconds"]} if {"seconds"} <= whole.keys() & ahead.keys() else {})


# ---- memory, host, launches, ranks


def streams(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    """Kernels that read and write whole tensors, with the bytes that they move."""
    width = 4096 if sizes.streamed >= 2**20 else 64
    made = where()
    count = sizes.streamed // torch.empty(0, dtype=made["dtype"]).element_size() // width
    a, b = (torch.randn(count, width, **made) for _ in range(2))
    out, weight = torch.empty_like(a), torch.ones(width, **made)
    for name, passes, work in (
        ("copy", 2, lambda: out.copy_(a)),
        ("sum of two", 3, lambda: torch.add(a, b, out=out)),
        ("norm", 2, lambda: torch.nn.functional.rms_norm(a, (width,), weight, 1e-6)),
    ):
        yield meter.told({"kind": "stream", "of": name, "bytes": passes * a.nbytes}, lambda work=work: work)


def host_copies(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    """A GPU's tensor to pinned memory of the host, and back."""
    gpu = torch.cuda.is_available()
    here = torch.empty(sizes.streamed, dtype=torch.uint8, device="cuda" if gpu else "cpu")
    there = torch.empty(sizes.streamed, dtype=torch.uint8, pin_memory=gpu)
    for name, work in (
        ("to host", lambda: there.copy_(here, non_blocking=True)),
        ("to device", lambda: here.copy_(there, non_blocking=True)),
    ):
        yield meter.told({"kind": "host copy", "of": name, "bytes": sizes.streamed}, lambda work=work: work)


def launches(sizes: Sizes, meter: Meter, config: Config) -> Iterator[dict]:
    """Kernels of one number, one after the other: what starting one takes."""
    one = torch.zeros(1, device=where()["device"])

    def work() -> None:
        for _ in range(sizes.launches):
            one.add_(1.0)

    yield meter.told({"kind": "launch", "count": sizes.launches}, lambda: work)


def exchange(gpu: Gpu) -> Iterator[dict]:
    """The all-reduce of all ranks, where there are several. Collective."""
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world > 1:
        found = devices.measure_all_reduce(120)
        yield {"kind": "all-reduce", "ranks": world, "local": local, "bytes": found.bytes, "backend": found.backend,
               "bandwidth": found.bandwidth}  # fmt: skip


if __name__ == "__main__":
    main()

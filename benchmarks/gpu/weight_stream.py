"""The weight sync of one GPU beside a plain copy, vLLM's own reload, and what sleep and wake cost.

    python benchmarks/gpu/weight_stream.py [--model qwen2.5-1.5b] [--bucket MiB] [--json FILE] [--seconds N] [--tiny]

Random bf16 weights of Qwen2.5's shapes in Megatron-Core and in vLLM, in one process as in training; medians, the ways in turns:
  copy      as many bytes from one buffer on the device to another, in one go
  stream    our part: gather, rename, copy to the buckets: Policy.hand_over() to its end
  reload    vLLM's own, of the same tensors from memory: Engine.sync() of one bucket
  whole     the stream into the reload: Engine.sync(Policy.hand_over())
Sleep at level 1 keeps the weights on the host, at level 2 drops them; the wake of level 2 is a sync's, without the stream. Seconds are told
for each GiB of weights at level 1, which moves them, and of memory given back at level 2. On a CPU an engine does not sleep. The stream
alone is also measured for a 7B's shapes, whose tensors are larger: what a copy costs to be started weighs less there.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common
import torch

from megatron_nft import policy, rollout
from megatron_nft.config import Config

GIB = 2**30
MOST = "<= 2"  # of the copy's time
ALONE = "qwen2.5-7b"


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=75)
    parser.add_argument("--model", choices=[name for name in common.SHAPES if name != "tiny"], default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=common.positive)
    parser.add_argument("--bucket", type=common.positive, default=256, help="MiB, rollout.update_weights_bucket_megabytes")
    parser.add_argument("--repeats", type=common.positive, default=5)
    return parser.parse_args()


def settings_of(folder: Path, bucket: int) -> Config:
    config = Config(run_dir="unused")
    config.model.path, config.model.precision = str(folder), "bf16"
    config.rollout.update_weights_bucket_megabytes, config.rollout.cpu_kvcache_space = bucket, 1
    config.rollout.enforce_eager = True  # graphs have no part in this, and take long to capture
    config.rollout.max_num_seqs = 16
    return config


def exhaust(model: policy.Policy) -> None:
    """Take every tensor of the stream, and keep none."""
    for bucket in model.hand_over():
        for _ in bucket.tensors():
            pass
        del bucket


def copy_of(nbytes: int):
    """A copy of so many bytes from one buffer on the device to another."""
    source = torch.ones(nbytes, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def stream_alone(hf: dict, topology: policy.Topology, bucket: int, repeats: int) -> dict:
    """Without an engine, and without values: memory as it was found."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf))
        config = settings_of(Path(folder), bucket)
        model = policy.Policy(config, topology, trainable=False, weights=False)
    nbytes = sum(parameter.nbytes for parameter in model.module.parameters())
    seconds = common.in_turns({"copy": copy_of(nbytes), "stream": partial(exhaust, model)}, repeats)
    return {"bytes": nbytes} | {f"{name}_seconds": value for name, value in seconds.items()}


def timed_ways(model: policy.Policy, engine: rollout.Engine, repeats: int) -> dict:
    tensors = [(key, tensor.clone()) for key, tensor in model.weights()]
    nbytes = sum(tensor.nbytes for _, tensor in tensors)
    from_memory = SimpleNamespace(tensors=lambda: iter(tensors))
    ways = {
        "copy": copy_of(nbytes),
        "stream": partial(exhaust, model),
        "reload": lambda: engine.sync(iter([from_memory]), 1),
        "whole": lambda: engine.sync(model.hand_over(), 2),
    }
    return {"bytes": nbytes, "tensors": len(tensors)} | {f"{name}_seconds": s for name, s in common.in_turns(ways, repeats).items()}


def sleeps(model: policy.Policy, engine: rollout.Engine, repeats: int) -> dict:
    """Of each level: seconds to sleep and to wake, and bytes given back. The first round, which allocates on the host, does not count."""
    if not torch.cuda.is_available():
        return {}
    found: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        for level in (1, 2):
            engine.throughput.take()
            free = torch.cuda.mem_get_info()[0]
            asleep = common.timed(partial(engine.sleep, level), repeats=1, warm_up=0)[0]
            given_back = torch.cuda.mem_get_info()[0] - free
            if level == 1:
                awake = common.timed(engine.wake, repeats=1, warm_up=0)[0]
            else:
                engine.sync(model.hand_over(), 3)
                awake = engine.throughput.take()["wake_seconds"]
            for name, value in (("sleep", asleep), ("wake", awake), ("given_back", given_back)):
                found.setdefault(f"level_{level}_{name}", []).extend([value] if number else [])
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


def ratios(row: dict, alone: dict) -> list[dict]:
    """What was measured of them."""
    found = [
        common.ratio(
            f"weight stream of {of['model']}, our part: time to a copy of as many bytes", of["stream_seconds"] / of["copy_seconds"], MOST
        )
        for of in (row, alone)
        if "error" not in of
    ]
    if "error" in row:
        return found
    ours, reload, whole, copy = (row[f"{name}_seconds"] for name in ("stream", "reload", "whole", "copy"))
    found.append(common.ratio("vLLM's own reload: time to a copy of as many bytes", reload / copy))
    found.append(common.ratio("whole sync: time to stream and reload apart", whole / (ours + reload)))
    weights = row["bytes"] / GIB
    for name in ("sleep", "wake"):
        one, two, back = row.get(f"level_1_{name}"), row.get(f"level_2_{name}"), row.get("level_2_given_back")
        found.append(common.ratio(f"{name}, level 1: seconds a GiB of weights", one and one / weights))
        found.append(common.ratio(f"{name}, level 2: seconds a GiB given back", two and back and two / (back / GIB)))
    return found


def colocated(arguments: argparse.Namespace, hf: dict, topology: policy.Topology, budget: common.Budget) -> dict:
    """Trainer and engine in this process."""
    if not budget.left:
        return common.NO_TIME
    with tempfile.TemporaryDirectory() as scratch:
        config = settings_of(common.write_model(hf, Path(scratch) / "model"), arguments.bucket)
        model = policy.Policy(config, topology, trainable=False)
        engine = rollout.Engine(config.model.path, config.rollout, 128, "bf16", config.seed)
    found = timed_ways(model, engine, arguments.repeats) | (sleeps(model, engine, 2) if budget.left else {})
    engine.close()
    return found


def main() -> None:
    arguments = parse()
    budget = common.budget_of(arguments)
    names = ("tiny", "tiny") if arguments.tiny else (arguments.model, ALONE)
    shapes = common.shape(names[0], arguments.layers), common.shape(names[1])
    config, layers = Config(run_dir="unused"), [hf["num_hidden_layers"] for hf in shapes]
    topology = policy.initialize(config.parallel, config.seed)
    of = {"model": names[1], "layers": layers[1], "bucket_mib": arguments.bucket, "alone": True}
    alone = common.row(of, lambda: stream_alone(shapes[1], topology, arguments.bucket, arguments.repeats))
    common.free()
    of |= {"model": names[0], "layers": layers[0], "alone": False}
    # should this be ended before the engine has started
    common.save("weight_stream", [alone], ratios(common.NO_TIME, alone), arguments.json)
    row = common.row(of, lambda: colocated(arguments, shapes[0], topology, budget))
    policy.shutdown()
    for one in (alone, row):
        for name in ("copy", "stream", "reload", "whole"):
            if seconds := one.get(f"{name}_seconds"):
                print(f"{one['model']:<14}{name:<8}{seconds * 1e3:>10.2f} ms{one['bytes'] / GIB / seconds:>10.1f} GiB/s")
    common.finish("weight_stream", [row, alone], ratios(row, alone), arguments.json)


if __name__ == "__main__":
    main()

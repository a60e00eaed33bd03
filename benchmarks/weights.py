"""Weight sync: our stream beside a plain copy, vLLM's own reload, and both together; and what a large model would take.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/weights.py [--models 0.5B 1.5B] [--repeats N] [--bucket MiB] [--tiny] [--plan]

Random bf16 weights of Qwen2.5's shapes in Megatron-Core and in vLLM, in one process as in training. Medians of
  plain copy   as many bytes, tensor by tensor, to memory that is there
  stream       gather, rename, copy to the buckets: Policy.hand_over() to its end
  reload       vLLM's own, of the same tensors from memory: Engine.sync() of one bucket
  whole        the stream into the reload: Engine.sync(Policy.hand_over())
and the stages of the stream, in one process and on two tensor-parallel ranks over gloo. Targets: stream at most 2 x the plain copy, whole
at most 1.2 x stream + reload. --tiny: a small model, to show that the script runs; the targets are not meant for it. --plan: nothing runs;
the time of a sync of Qwen2.5-32B on H100 is ESTIMATED from the stream's own plan and the bandwidths in weights_plan.py.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import weights_plan  # noqa: E402

from megatron_nft import policy, rollout  # noqa: E402
from megatron_nft.config import Config  # noqa: E402
from megatron_nft.weights import stream, table_for  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "arithmetic" / "model"
COMMON = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
          "max_position_embeddings": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}  # fmt: skip
MODELS = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
STAGES = {"_everyones": "plan", "received": "pack and broadcast", "gather": "gather", "_filled": "copies to the bucket"}


def write_model(name: str, folder: Path) -> None:
    """A Hugging Face directory of random weights."""
    config = {**COMMON, **MODELS[name]}
    torch.manual_seed(0)
    tensors = {key: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02) for key, shape in table_for(config).hf_shapes().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def settings_of(folder: Path, bucket: int, tp: int = 1) -> Config:
    settings = Config(run_dir="unused")
    settings.model.path, settings.model.precision = str(folder), "bf16"
    settings.parallel.tensor_model_parallel_size = tp
    settings.rollout.update_weights_bucket_megabytes, settings.rollout.cpu_kvcache_space = bucket, 1
    return settings


def seconds(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median of each way, after one run that is not counted. The ways take turns, so that other work on the machine slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def exhaust(model: policy.Policy) -> None:
    """Take every tensor of the stream, and keep none."""
    for bucket in model.hand_over():
        for _ in bucket.tensors():
            pass
        del bucket


@contextmanager
def stages_timed():
    """Seconds by stage of the stream, in a Counter that fills while it runs; a stage's own, without the stages it calls."""
    found, running = Counter(), []

    def timed(function: Callable, stage: str) -> Callable:
        def run(*args, **kwargs):
            running.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                found[stage] += took - running.pop()
                if running:
                    running[-1] += took

        return run

    module = sys.modules[stream.__module__]
    with mock.patch.multiple(module, **{name: timed(getattr(module, name), stage) for name, stage in STAGES.items()}):
        yield found


def stages_of(model: policy.Policy, repeats: int) -> dict[str, float]:
    """Mean seconds of each stage of a stream."""
    exhaust(model)
    with stages_timed() as found:
        for _ in range(repeats):
            exhaust(model)
    return {stage: found[stage] / repeats for stage in STAGES.values() if found[stage] / repeats > 1e-6}


def measure(name: str, folder: Path, bucket: int, repeats: int) -> dict:
    """Of one process with trainer and engine."""
    settings = settings_of(folder, bucket)
    topology = policy.initialize(settings.parallel, settings.seed)
    model = policy.Policy(settings, topology, trainable=False)
    engine = rollout.Engine(settings.model.path, settings.rollout, 128, "bf16", settings.seed)
    tensors = [(key, tensor.clone()) for key, tensor in model.weights()]
    targets = [torch.zeros_like(tensor) for _, tensor in tensors]
    from_memory = SimpleNamespace(tensors=lambda: iter(tensors))

    def copy() -> None:
        for target, (_, tensor) in zip(targets, tensors):
            target.copy_(tensor)

    ways = {
        "plain copy": copy,
        "stream": lambda: exhaust(model),
        "reload": lambda: engine.sync(iter([from_memory]), 1),
        "whole": lambda: engine.sync(model.hand_over(), 2),
    }
    found = {"model": name, "tensors": len(tensors), "bytes": sum(tensor.nbytes for _, tensor in tensors)}
    found |= seconds(ways, repeats) | {"stages": stages_of(model, repeats)}
    engine.close()
    policy.shutdown()
    return found


def measure_ranks(folder: Path, bucket: int, repeats: int) -> dict | None:
    """The stream alone on tensor-parallel ranks; on the first of them its stages."""
    settings = settings_of(folder, bucket, tp=policy.world_size())
    topology = policy.initialize(settings.parallel, settings.seed)
    model = policy.Policy(settings, topology, trainable=False)
    found = seconds({"stream": lambda: exhaust(model)}, repeats) | {"stages": stages_of(model, repeats)}
    policy.shutdown()
    return found if topology.is_first else None


def apart(arguments: list[str], ranks: int) -> dict:
    """What this script, started anew, finds: memory and groups of one measurement are gone before the next."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        subprocess.run([sys.executable, *launcher, __file__, *arguments, "--one", str(output)], check=True)
        return json.loads(output.read_text())


def show(one: dict, two: dict) -> None:
    """A table of one model."""
    gib = one["bytes"] / 2**30
    print(f"\n{one['model']}: {one['tensors']} tensors, {gib:.2f} GiB in bf16")
    for way in ("plain copy", "stream", "reload", "whole"):
        print(f"  {way:<34}{one[way]:>9.3f} s{gib / one[way]:>9.2f} GiB/s")
    ratios = {"stream / plain copy": (one["stream"] / one["plain copy"], 2),
              "whole / (stream + reload)": (one["whole"] / (one["stream"] + one["reload"]), 1.2)}  # fmt: skip
    for ratio, (found, target) in ratios.items():
        print(f"  {ratio:<34}{found:>9.2f}" + (f"     target: at most {target}" if one["model"] != "tiny" else ""))
    for title, found in (("one rank", one), ("two tensor-parallel ranks", two)):
        print(f"  stages of the stream, {title}, {found['stream']:.3f} s:")
        for stage, spent in found["stages"].items():
            print(f"    {stage:<32}{spent:>9.4f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["0.5B", "1.5B"], choices=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket", type=int, default=256, help="MiB, rollout.update_weights_bucket_megabytes")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--plan", action="store_true", help="print an estimate for Qwen2.5-32B; nothing is run")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        return weights_plan.show(given.bucket)
    if given.one:
        ranks = policy.world_size() > 1
        found = measure_ranks(given.folder, given.bucket, given.repeats) if ranks else measure(
            given.folder.name, given.folder, given.bucket, given.repeats)  # fmt: skip
        if found:
            given.one.write_text(json.dumps(found))
        return None
    print(f"torch {torch.__version__}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads, buckets of {given.bucket} MiB")
    for name in ["tiny"] if given.tiny else given.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            write_model(name, folder)
            arguments = ["--folder", str(folder), "--repeats", str(given.repeats), "--bucket", str(given.bucket)]
            show(apart(arguments, 1), apart(arguments, 2))
    return None


if __name__ == "__main__":
    main()

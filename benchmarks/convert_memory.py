"""Peak memory and speed of the two conversions of a 7B-shaped model of random weights.

    python benchmarks/convert_memory.py [--directory DIR] [--tiny]

makes a model of Qwen2.5-7B's shapes in bfloat16 (15.2 GB; twice that of room in DIR is needed, a temporary directory by default), converts
it to a Megatron checkpoint and back, each in a process of its own, prints their peak resident memory, and removes all it made. The way
back is compared with the source bit for bit: every tensor is made from its own seed, twice.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from megatron_nft.weights import Kind, convert_to_huggingface, load_huggingface, table_for  # noqa: E402

LIMIT = 3e9  # bytes of resident memory, what the conversions promise
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
CHILD = """
import sys
from megatron_nft.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def main() -> None:
    """Make, convert twice, print, compare, remove."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--directory", type=Path, help="where to write; a temporary directory by default")
    arguments.add_argument("--tiny", action="store_true", help="a model of kilobytes, to try the script")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-memory-", dir=given.directory) as scratch:
        source, there, back = (Path(scratch) / name for name in ("source", "megatron", "huggingface"))
        make(source, QWEN | TINY if given.tiny else QWEN)
        peaks = [measured("hf-to-megatron", source, there)]
        shutil.rmtree(source)
        peaks.append(measured("megatron-to-hf", there, back))
        shutil.rmtree(there)
        compare(back)
    if max(peaks) > LIMIT:
        sys.exit(f"more than {LIMIT / 1e9:.0f} GB")


def make(directory: Path, config: dict) -> None:
    """A Hugging Face directory of random weights."""
    template = directory.with_name("template")
    template.mkdir()
    (template / "config.json").write_text(json.dumps(config))
    kinds = {name: Kind(shape, torch.bfloat16) for name, shape in table_for(config).hf_shapes().items()}
    numbers = {name: number for number, name in enumerate(kinds)}
    convert_to_huggingface(directory, kinds, lambda name: tensor(numbers[name], kinds[name].shape), template, template, lambda nbytes: None)


def tensor(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The weights of a number, always the same."""
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(number))


def measured(kind: str, source: Path, output: Path) -> float:
    """Convert, print, and return the peak of resident memory in bytes."""
    started, root = time.perf_counter(), Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", CHILD, "convert", kind, str(source), str(output)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    seconds, size = time.perf_counter() - started, sum(file.stat().st_size for file in output.iterdir())
    peak = float(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    print(f"{kind}: {size / 1e9:.2f} GB in {seconds:.0f} s with the start, {size / 1e9 / seconds:.2f} GB/s; "
          f"at most {peak / 1e9:.2f} GB of memory resident", flush=True)  # fmt: skip
    return peak


def compare(back: Path) -> None:
    """Against the weights as they were made."""
    written = load_huggingface(back)
    for number, (name, shape) in enumerate(written.shapes().items()):
        if not torch.equal(written.get(name).view(torch.int16), tensor(number, shape).view(torch.int16)):
            sys.exit(f"{name} is not what it was")
    print(f"{len(written.names())} tensors are bit for bit what they were")


if __name__ == "__main__":
    main()

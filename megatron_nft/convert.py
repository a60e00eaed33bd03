"""Hugging Face <-> Megatron checkpoints, and the proof that nothing is lost on the way.

One process, without layout flags: a checkpoint loads under any layout, so the whole model is laid out on one device. Memory: the model
once, and one Hugging Face shard. CUDA_VISIBLE_DEVICES= converts in main memory what one GPU does not hold.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_nft import policy
from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import checkpoint, topology
from megatron_nft.weights import HuggingFaceWeights, check_vacant, load_huggingface, save_huggingface, whole_or_nothing

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SHOWN = 5  # differing tensors that verify names


def hf_to_megatron(source: Path, output: Path) -> None:
    """Write a Megatron checkpoint of a Hugging Face directory; it holds the config and tokenizer files too.

    Raises UserError for a source that load_huggingface or policy.check refuses, and where output is not vacant; output is then not
    touched.
    """
    check_vacant(output)
    settings = _settings(source, _storage(load_huggingface(source)))
    policy.check(settings, window=0)
    with _one_process() as place:
        _to_megatron(settings, output, place)


def megatron_to_hf(directory: Path, output: Path) -> None:
    """Write the weights of a checkpoint, converted or from training, as a Hugging Face directory.

    A converted model gets back the dtypes it came with; a trained one has those it was trained in, and config.json says so.
    Raises UserError for what is no complete checkpoint, and where output is not vacant.
    """
    check_vacant(output)
    checkpoint.read_manifest(directory)
    with _one_process() as place:
        _to_hf(directory, output, place)


def verify(source: Path) -> None:
    """Convert there and back in a temporary directory (twice the model's size; TMPDIR chooses where) and compare every tensor's name,
    shape, dtype and bits. Prints the result; raises UserError where something differs."""
    before = load_huggingface(source)
    settings = _settings(source, _storage(before))
    policy.check(settings, window=0)
    with tempfile.TemporaryDirectory(prefix="megatron-nft-verify-") as scratch, _one_process() as place:
        there, back = Path(scratch) / "megatron", Path(scratch) / "huggingface"
        _to_megatron(settings, there, place)
        _to_hf(there, back, place)
        differing = differences(before, load_huggingface(back))
    for line in differing[:SHOWN]:
        _say(line)
    if differing:
        raise UserError(
            f"{len(differing)} of {len(before.names())} tensors of {source} differ after the way back", "do not use the conversion"
        )
    _say(f"{len(before.names())} tensors, bit-identical")


def differences(before: HuggingFaceWeights, after: HuggingFaceWeights) -> list[str]:
    """One line for each tensor that is not the same: missing, new, of another shape or dtype, or with other bits."""
    old, new = before.dtypes(), after.dtypes()
    lines = [f"{name} is missing" for name in old if name not in new]
    lines += [f"{name} is new" for name in new if name not in old]
    for name in old:
        if name not in new:
            continue
        a, b = before.get(name), after.get(name)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            lines.append(f"{name} was {_kind(a)}, is {_kind(b)}")
        elif other := int((_bits(a) != _bits(b)).sum()):
            lines.append(f"{name} differs in {other} of {a.numel()} numbers")
    return lines


def _to_megatron(settings: Config, output: Path, place: policy.Topology) -> None:
    started, source = time.perf_counter(), load_huggingface(settings.model.path)
    model = policy.Policy(settings, place, trainable=False)
    _report("read", source.directory, model, started)
    started, held = time.perf_counter(), model.module.config.params_dtype
    others = {name: _name(dtype) for name, dtype in source.dtypes().items() if dtype != held}
    with whole_or_nothing(output.resolve()) as partial:
        model.save(partial, {"dtypes": others})
    _report("wrote", output, model, started)


def _to_hf(directory: Path, output: Path, place: policy.Topology) -> None:
    started, held = time.perf_counter(), getattr(torch, checkpoint.read_manifest(directory)["dtype"])
    model = policy.Policy(_settings(directory, held), place, trainable=False, weights=False)
    dtypes = model.load(directory).get("dtypes", {})  # a training run has none
    _report("read", directory, model, started)
    started = time.perf_counter()
    save_huggingface(output, _cast(model.weights(), dtypes), directory)
    _report("wrote", output, model, started)


def _cast(tensors: Iterator[tuple[str, Tensor]], dtypes: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the named dtypes; those that have none stay as they are."""
    for name, tensor in tensors:
        yield name, tensor.to(getattr(torch, dtypes[name])) if name in dtypes else tensor


def _storage(source: HuggingFaceWeights) -> torch.dtype:
    """What the checkpoint holds the weights in: bfloat16 if all of them have it, otherwise float32, which holds each one exactly."""
    return torch.bfloat16 if set(source.dtypes().values()) == {torch.bfloat16} else torch.float32


def _settings(path: Path, held: torch.dtype) -> Config:
    settings = Config(run_dir="")
    settings.model.path, settings.model.precision = str(path), PRECISIONS[held]
    return settings


@contextmanager
def _one_process() -> Iterator[policy.Topology]:
    """Megatron's groups for a world of one. Raises UserError under a launcher of several ranks."""
    if topology.world_size() != 1:
        raise UserError(f"convert was started as {topology.world_size()} ranks", "start it without torchrun or srun")
    try:
        yield policy.initialize(Config(run_dir="").parallel, seed=1)
    finally:
        policy.shutdown()


def _kind(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> Tensor:
    """As integers: a NaN is then equal to itself, and 0 is not -0."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _report(verb: str, directory: Path, model: policy.Policy, started: float) -> None:
    size = sum(file.stat().st_size for file in directory.iterdir() if file.suffix in (".safetensors", ".distcp"))
    seconds = time.perf_counter() - started
    _say(f"{verb} {directory}: {len(model.table.hf_shapes())} tensors, {size / 1e9:.3f} GB, {seconds:.1f} s")


def _say(line: str) -> None:
    print(line, flush=True)

"""Hugging Face <-> Megatron checkpoints, tensor by tensor: neither direction holds the model, or more than a file of it, in memory.

One process, without layout flags: a checkpoint loads under any layout. Both directions write into a hidden directory that the same command
goes on with after a kill (weights/resume.py), and that takes its name when it is complete.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_nft import logbook, policy
from megatron_nft.config import Config
from megatron_nft.errors import UserError
from megatron_nft.policy import checkpoint, streamed, topology, versions
from megatron_nft.weights import (
    HuggingFaceWeights,
    Kind,
    TorchDistWeights,
    check_companions,
    check_tokenizer,
    check_vacant,
    convert_to_huggingface,
    copy_companions,
    find_iteration,
    load_huggingface,
    read_json,
    resumable,
    stamps,
)
from megatron_nft.weights.torch_dist import BACKEND, LATEST

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def hf_to_megatron(source: Path, output: Path) -> None:
    """Write a Megatron checkpoint of a Hugging Face directory; it holds the config and tokenizer files too.

    Raises UserError for a source that load_huggingface, policy.check or check_tokenizer refuses, where output is not vacant, and where the
    disk has no room.
    """
    output = output.resolve()  # a link is followed: its target is what is written
    check_vacant(output)
    hf = checked(source)
    settings = settings_of(source, storage(hf))
    policy.check(settings, window=0)
    with one_process() as place:
        to_megatron(hf, settings, output, place)


def megatron_to_hf(directory: Path, output: Path, hf_config: Path | None = None) -> None:
    """Write the weights of a checkpoint as a Hugging Face directory.

    directory: converted, from training, or Megatron-LM's own (an iter_ directory, or the one above it; format torch_dist), for which
    hf_config is a directory with the model's config.json and tokenizer. A converted model gets back the dtypes it came with; others
    have those they are stored in, and config.json says so.
    Raises UserError for what is no complete checkpoint or another model's, where output is not vacant, and where the disk has no room.
    """
    output = output.resolve()  # a link is followed: its target is what is written
    check_vacant(output)
    if topology.world_size() != 1:
        _one_rank_only()
    to_hf(*open_checkpoint(directory, hf_config), output)


def checked(source: Path) -> HuggingFaceWeights:
    """A Hugging Face directory that is all there. Raises UserError for one that is not."""
    hf = load_huggingface(source)
    hf.check_index()
    check_tokenizer(source, hf.config["vocab_size"])
    check_companions(source)
    return hf


def open_checkpoint(directory: Path, hf_config: Path | None) -> tuple[TorchDistWeights, Path, dict[str, str]]:
    """(weights, directory with config and tokenizer, dtypes other than the stored ones). Raises UserError as megatron_to_hf does."""
    if hf_config is None:
        if not (directory / checkpoint.MANIFEST).is_file() and _looks_like_megatron_lm(directory):
            raise UserError(
                f"{directory} has no {checkpoint.MANIFEST}: it is Megatron-LM's own, or not complete",
                "if it is Megatron-LM's own, give --hf-config HF_DIR, a directory with the model's config.json and tokenizer",
            )
        manifest = checkpoint.read_manifest(directory)
        weights = TorchDistWeights(directory, read_json(directory / "config.json"))
        return weights, directory, manifest["state"].get("dtypes", {})
    if not (hf_config / "config.json").is_file():
        raise UserError(f"no config.json in {hf_config}", "give --hf-config a directory with the model's config.json and tokenizer")
    place = find_iteration(directory)
    manifest = checkpoint.read_manifest(place) if (place / checkpoint.MANIFEST).is_file() else {"state": {}}  # Megatron-LM's has none
    weights = TorchDistWeights(place, read_json(hf_config / "config.json"))
    check_tokenizer(hf_config, weights.config["vocab_size"])
    check_companions(hf_config)
    return weights, hf_config, manifest["state"].get("dtypes", {})


def to_megatron(hf: HuggingFaceWeights, settings: Config, output: Path, place: policy.Topology) -> None:
    """Of a source and settings that were checked."""
    started, held = time.perf_counter(), storage(hf)
    others = {name: _name(dtype) for name, dtype in hf.dtypes().items() if dtype != held}
    shapes = hf.shapes().values()
    total = sum(Kind(shape, held).nbytes for shape in shapes)
    made_of = {"to": "megatron", "files": stamps([hf.directory]), "megatron": versions.version(), "torch": torch.__version__}
    with Progress(total, f"converting {hf.directory.name}") as progress, resumable(output, made_of, total) as unfinished:
        streamed.write_checkpoint(hf, settings, unfinished, progress)
        copy_companions(hf.directory, unfinished.directory)
        checkpoint.write_manifest(unfinished.directory, unfinished.files(), place, held, {"dtypes": others})
    _report(output, len(shapes), total, started)


def to_hf(weights: TorchDistWeights, template: Path, dtypes: dict[str, str], output: Path) -> None:
    """Of a checkpoint that was opened."""
    started, shapes = time.perf_counter(), weights.shapes()
    wanted = {name: getattr(torch, dtypes[name]) if name in dtypes else dtype for name, dtype in weights.dtypes().items()}
    kinds = {name: Kind(shapes[name], wanted[name]) for name in shapes}
    total = sum(kind.nbytes for kind in kinds.values())

    def get(name: str) -> Tensor:
        return _narrowed(weights.get(name), wanted[name])

    with Progress(total, f"converting {weights.directory.name}") as progress:
        convert_to_huggingface(output, kinds, get, template, weights.directory, progress)
    _report(output, len(shapes), total, started)


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype it came in. A bfloat16 is the upper half of its float32; torch's rounding would give a NaN other bits."""
    if (tensor.dtype, dtype) == (torch.float32, torch.bfloat16):
        return (tensor.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return tensor.to(dtype)


class Progress:
    """A bar on a terminal, plain lines elsewhere; called with bytes, it shows MB."""

    def __init__(self, total: int, label: str):
        self._bar, self._bytes, self._shown = logbook.progress(max(total // 10**6, 1), label, "MB"), 0, 0

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.__exit__(*exception)

    def __call__(self, nbytes: int) -> None:
        self._bytes += nbytes
        whole = self._bytes // 10**6
        if whole > self._shown:
            self._bar.update(whole - self._shown)
            self._shown = whole


def storage(source: HuggingFaceWeights) -> torch.dtype:
    """What the checkpoint holds the weights in: bfloat16 if all of them have it, otherwise float32, which holds each one exactly."""
    return torch.bfloat16 if set(source.dtypes().values()) == {torch.bfloat16} else torch.float32


def settings_of(path: Path, held: torch.dtype) -> Config:
    """Settings of a run that holds the model in this dtype, in one process."""
    settings = Config(run_dir="")
    settings.model.path, settings.model.precision = str(path), PRECISIONS[held]
    return settings


@contextmanager
def one_process() -> Iterator[policy.Topology]:
    """Megatron's groups for a world of one. Raises UserError under a launcher of several ranks."""
    if topology.world_size() != 1:
        _one_rank_only()
    try:
        yield policy.initialize(Config(run_dir="").parallel, seed=1)
    finally:
        policy.shutdown()


def _one_rank_only() -> None:
    raise UserError(f"convert was started as {topology.world_size()} ranks", "start it without torchrun or srun")


def _looks_like_megatron_lm(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (LATEST, BACKEND))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _report(output: Path, tensors: int, total: int, started: float) -> None:
    seconds = time.perf_counter() - started
    rate = f"{total / 1e9 / seconds:.2f} GB/s"
    print(f"wrote {output}: {tensors} tensors, {total / 1e9:.3f} GB, {seconds:.1f} s, {rate}", flush=True)

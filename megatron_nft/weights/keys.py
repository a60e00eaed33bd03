"""The keys under which Megatron-Core's distributed checkpoints hold a model's tensors.

Layers stand in the key ("decoder.layers.7.mlp...") or are an axis of their own before the tensor's ("decoder.layers.mlp..." of shape
[layers, ...]); so do experts ("mlp.experts.experts.3." or "mlp.experts.experts." of [experts, ...]), whether they are a sequence of modules
or grouped. A gated weight may be kept in two halves, "weight_w" (gate) and "weight_v" (up).
"""

import re
from dataclasses import dataclass
from itertools import product

import torch

from megatron_nft.errors import UserError
from megatron_nft.weights.table import HEAD, Table

MODEL = ("embedding.", "decoder.", "output_layer.")  # how the keys of a model start; an optimizer's start with "optimizer."
_NO_LAYER = re.compile(r"^decoder\.layers\.(?!\d)")
_NO_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(?!\d)")
_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.")
_HALF = re.compile(r"^(.*\.linear_fc1\.weight)_([wv])$")
OTHER_CONFIG = "give the config.json of the model that was saved"


@dataclass(frozen=True)
class Place:
    """A Megatron tensor, or a half of it: what follows the leading axes of a key's tensor at these numbers."""

    key: str
    leading: tuple[int, ...] = ()


def leading_axes(key: str) -> int:
    """Axes before those of the model's tensor: of layers, of experts, of both."""
    return bool(_NO_LAYER.search(key)) + bool(_NO_EXPERT.search(key))


def megatron_name(place: Place) -> tuple[str, str | None]:
    """(name in the model with global layer and expert numbers, "w" or "v" where it is a half)."""
    numbers = iter(place.leading)
    name = _NO_LAYER.sub(lambda _: f"decoder.layers.{next(numbers)}.", place.key)
    name = _NO_EXPERT.sub(lambda _: f".mlp.experts.experts.{next(numbers)}.", name)
    name = _EXPERT.sub(r".mlp.experts.local_experts.\1.", name)
    half = _HALF.match(name)
    return (half[1], half[2]) if half else (name, None)


def find_places(sizes: dict[str, tuple[int, ...]], table: Table, where: str) -> dict[str, list[Place]]:
    """The place of every tensor of the model by its name in the table; a gated weight may have two, gate first.

    sizes: of the tensors by key, with whatever else the checkpoint holds. Raises UserError, which names `where`, unless they are exactly
    the model's, in its shapes; the vocabulary may be padded.
    """
    found: dict[str, dict[str, Place]] = {}
    for key, size in sizes.items():
        if not key.startswith(MODEL):
            continue
        if table.tied and key == HEAD.megatron:
            raise UserError(f"{where} has a head of its own ({key}), and its config ties it to the embedding", OTHER_CONFIG)
        for leading in product(*map(range, size[: leading_axes(key)])):
            place = Place(key, leading)
            name, half = megatron_name(place)
            try:
                found.setdefault(table.canonical(name), {})[half or ""] = place
            except ValueError:
                raise UserError(f"{where} holds {name}, for which its config has no place", OTHER_CONFIG) from None
    if missing := [name for name in table.megatron_names() if name not in found]:
        raise UserError(f"{where} lacks {len(missing)} tensors of its model, the first is {missing[0]}", OTHER_CONFIG)
    places = {name: [halves[half] for half in ("", "w", "v") if half in halves] for name, halves in found.items()}
    shapes = megatron_shapes(table)
    for name, parts in places.items():
        held = [sizes[part.key][len(part.leading) :] for part in parts]
        whole = (sum(size[0] for size in held), *held[0][1:])
        vocabulary = shapes[name][0] == table.sizes.vocabulary and whole[0] >= shapes[name][0] and whole[1:] == shapes[name][1:]
        if whole != shapes[name] and not (vocabulary and name.startswith(("embedding.", "output_layer."))):
            raise UserError(f"{name} in {where} is {whole}, its config says {shapes[name]}", OTHER_CONFIG)
    return places


def megatron_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Of every Megatron tensor of the model, not padded."""
    shapes = table.hf_shapes()
    return {name: tuple(table.to_megatron(name, lambda n: torch.empty(shapes[n], device="meta")).shape) for name in table.megatron_names()}

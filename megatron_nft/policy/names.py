"""The names of a rank's parameters, with the layers' and experts' numbers in the whole model."""

import re
from collections.abc import Iterable, Iterator

from torch.nn import Parameter

from megatron_nft.weights import expert_number, with_expert


def numbered(modules: Iterable, first_expert: int) -> Iterator[tuple[str, Parameter]]:
    """Every parameter of a pipeline stage's GPTModels under its Megatron name; first_expert: the number of the rank's first expert."""
    for module in modules:
        offset = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0
        for name, parameter in module.named_parameters():
            name = re.sub(r"^decoder\.layers\.(\d+)\.", lambda m, by=offset: f"decoder.layers.{int(m[1]) + by}.", name)
            if (expert := expert_number(name)) is not None:
                name = with_expert(name, first_expert + expert)
            yield name, parameter


def is_tied_copy(name: str, last) -> bool:
    """Whether it is the last pipeline stage's own copy of a tied embedding; last: the stage's last GPTModel."""
    return name == "output_layer.weight" and last.share_embeddings_and_output_weights

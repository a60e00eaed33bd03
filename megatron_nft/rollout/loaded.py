"""What a vLLM engine holds after a reload, compared with what it was given. These functions run beside the engine's model, on every
rank of it.

vLLM fuses tensors (q, k, v; gate, up; all experts of a layer), cuts them over its own tensor-parallel ranks, experts over those of all
engines, and on some platforms packs a linear layer's weight into a form of its own, the plain one being empty then.
"""

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nft.checksums import Checksum, bit_sum

QUANTISED = 0.2  # relative error of a product of FP8 numbers, which is some 0.04; another tensor's is 1.4
EXPERTS = re.compile(r"(?P<path>.*\.mlp\.experts)\..*?(?P<kind>w13|w2)_weight$")
EXPERT_PARTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


def checksums(model: nn.Module, names: list[str]) -> dict[frozenset[str], Checksum]:
    """Checksums of the engine's plain parameters, by the Hugging Face tensors in them, on each of its ranks. A collective of the engine;
    with experts, of all engines.

    names: the model's Hugging Face tensors. Packed parameters, and those that vLLM has under another name, are left out.
    """
    modules, found = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if parameter.numel() and (held := _hf_names(model, name, names)):
            of_experts = EXPERTS.match(name) is not None
            found.setdefault(of_experts, {})[held] = (_own(modules[path], kind, parameter.data), str(parameter.dtype))
    return {held: one for of_experts in sorted(found) for held, one in _summed(found[of_experts], of_experts).items()}


def _summed(found: dict[frozenset[str], tuple[Tensor, str]], of_experts: bool) -> dict[frozenset[str], Checksum]:
    """The sums over the ranks that share the parameters."""
    totals = torch.stack([total for total, _ in found.values()])
    if (group := _ranks(of_experts)) is not None:
        dist.all_reduce(totals, group=group)
    return {held: Checksum(total, dtype) for (held, (_, dtype)), total in zip(found.items(), totals.tolist())}


def differs(model: nn.Module, name: str, full: Tensor) -> bool:
    """Whether this rank's part of a Hugging Face tensor is another than `full`'s: bit for bit where it is plain, by the product with a
    fixed vector where it is packed, or roughly so where it is quantised. False for what is not looked into: experts, and what vLLM has
    under another name."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for fused, parts in _packed(model).items():
        for number, part in enumerate(parts):
            if (at := name.replace(f".{part}.", f".{fused}.")) != name and at in parameters:
                return _linear_differs(modules[at.rpartition(".")[0]], parameters[at], number, full)
    if name not in parameters:
        return False
    return _linear_differs(modules[name.rpartition(".")[0]], parameters[name], 0, full)


def _linear_differs(module: nn.Module, parameter: nn.Parameter, number: int, full: Tensor) -> bool:
    """Of the tensor that is the `number`th of those fused in the parameter."""
    quantised = parameter.dtype.itemsize == 1
    wanted, rows = _part(module, number, full.detach().to(parameter.device, full.dtype if quantised else parameter.dtype))
    if parameter.numel() and not quantised:
        return not torch.equal(parameter.data[rows], wanted)
    probe = torch.randn(1, wanted.shape[1], generator=torch.Generator().manual_seed(0)).to(wanted)
    product, exact = module.quant_method.apply(module, probe)[0, rows].float(), wanted.double() @ probe[0].double()
    if quantised:
        return not bool((product - exact).norm() <= QUANTISED * exact.norm())
    rounding = torch.finfo(parameter.dtype).eps * exact.abs()  # of the result; sums are made in float32 at least
    tolerance = 2 * rounding + 16 * torch.finfo(torch.float32).eps * (wanted.double().abs() @ probe[0].double().abs())
    return bool(((product - exact).abs() > tolerance).any())


def _part(module: nn.Module, number: int, full: Tensor) -> tuple[Tensor, slice]:
    """This rank's part of a full tensor, and its rows in the module."""
    rank, size = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)
    if hasattr(module, "num_embeddings_per_partition"):  # the vocabulary is padded at its end
        mine = full[rank * module.num_embeddings_per_partition :][: module.num_embeddings_per_partition]
        return mine, slice(len(mine))
    if full.ndim == 2 and full.shape[1] != getattr(module, "input_size_per_partition", full.shape[1]):
        return full.chunk(size, dim=1)[rank], slice(None)  # row-parallel
    sizes = getattr(module, "output_partition_sizes", None)
    if sizes is None:
        return full, slice(None)
    slices = len(full) // sizes[number]  # fewer than ranks where several have the same key-value heads
    return full.chunk(slices)[rank * slices // size], slice(sum(sizes[:number]), sum(sizes[: number + 1]))


def _own(module: nn.Module, kind: str, values: Tensor) -> Tensor:
    """The checksum of this rank's part. What every rank has is the first one's; of key-value heads that several ranks have, one's."""
    copies = getattr(module, "num_kv_head_replicas", 1)
    if copies > 1 and module.tp_rank % copies:
        return bit_sum(values[: module.output_partition_sizes[0]])
    linear = getattr(module, "tp_size", 1) > 1 and type(module).__name__ != "ReplicatedLinear"
    cut = linear or EXPERTS.match(f".mlp.experts.{kind}")
    return bit_sum(values) if cut or _rank() == 0 else bit_sum(values[:0])


def _hf_names(model: nn.Module, name: str, names: list[str]) -> frozenset[str]:
    """The Hugging Face tensors in a parameter of vLLM's; none where it is not known."""
    if experts := EXPERTS.match(name):
        parts = EXPERT_PARTS[experts["kind"]]
        of_layer = re.compile(rf"{re.escape(experts['path'])}\.\d+\.({'|'.join(parts)})\.weight")
        return frozenset(n for n in names if of_layer.fullmatch(n))
    candidates = {name}
    for fused, parts in _packed(model).items():
        if f".{fused}." in name:
            candidates = {name.replace(f".{fused}.", f".{part}.") for part in parts}
    return frozenset(candidates) if candidates <= set(names) else frozenset()


def _packed(model: nn.Module) -> dict[str, list[str]]:
    """vLLM's own list of what it fuses, e.g. qkv_proj: q_proj, k_proj, v_proj."""
    return getattr(model, "packed_modules_mapping", None) or {}


def _ranks(of_experts: bool):
    """The group of the engine's ranks, or of all engines' that experts are cut over; None for a rank alone."""
    from vllm.distributed import parallel_state

    group = parallel_state.get_ep_group() if of_experts else parallel_state.get_tp_group()
    return group.device_group if group.world_size > 1 else None


def _rank() -> int:
    from vllm.distributed import parallel_state

    return parallel_state.get_tp_group().rank_in_group

"""What Megatron allocates for a rank's weights, gradients and optimizer: exactly, padding included."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_nft.config import Config
from megatron_nft.planner import parameters
from megatron_nft.planner.buffers import Buffer
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.parameters import Parameter

ITEMSIZE = {"auto": 2, "bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}  # bytes; the planner reckons with CUDA, where `auto` is bf16
MASTER, MOMENTS = 4, 8  # bytes of the float32 copy of a weight that is trained in 16 bits, and of Adam's two moments
ON_HOST = MASTER + MOMENTS + 4  # of a parameter that the host updates: those, and its gradient


@dataclass(frozen=True)
class Held:
    """Bytes of a rank. host: pinned or not, what HybridDeviceOptimizer keeps there with optimizer_cpu_offload."""

    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def device(self) -> int:
        """All that is on the GPU."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Stage:
    """The ranks of a pipeline stage, all of which hold the same parameters."""

    number: int
    config: Config
    layout: Layout
    chunks: list[list[Parameter]]

    @classmethod
    def all(cls, hf: dict, config: Config, layout: Layout, transformer_engine: bool = True) -> list["Stage"]:
        """Every stage of a model. The layout has to suit it (sizes.check_layout)."""
        held = (parameters.chunks(hf, config, layout, number, transformer_engine) for number in range(layout.pp))
        return [cls(number, config, layout, chunks) for number, chunks in enumerate(held)]

    @property
    def ranks(self) -> int:
        """Of this stage."""
        return self.layout.tp * self.layout.cp * self.layout.dp

    @property
    def numel(self) -> int:
        """Elements of a rank's parameters."""
        return sum(parameter.numel for chunk in self.chunks for parameter in chunk)

    @cached_property
    def dense(self) -> list[Buffer]:
        """Buffers shared by the data- and context-parallel ranks."""
        return list(self._buffers(False, self.layout.dp * self.layout.cp))

    @cached_property
    def experts(self) -> list[Buffer]:
        """Buffers of experts that other ranks do not have."""
        return list(self._buffers(True, self.ranks // (self.layout.ep * self.layout.etp)))

    def held(self, rank: int) -> Held:
        """Of a rank of the stage; they count tensor, context, data parallel from the inside, or expert tensor, expert, expert data."""
        numbers = rank // self.layout.tp, rank // (self.layout.ep * self.layout.etp)
        parts = [self._optimizer(buffers, number) for buffers, number in zip((self.dense, self.experts), numbers)]
        every = [*self.dense, *self.experts]
        weights = sum(buffer.numel * buffer.itemsize for buffer in every)
        gradients = sum(buffer.numel * buffer.gradient_itemsize for buffer in every)
        return Held(weights, gradients, *map(sum, zip(*parts)))

    @cached_property
    def fullest(self) -> Held:
        """Of the rank whose GPU holds most."""
        alike = {(rank // self.layout.tp, rank // (self.layout.ep * self.layout.etp)): rank for rank in range(self.ranks)}
        return max((self.held(rank) for rank in alike.values()), key=lambda held: (held.device, held.host))

    def _buffers(self, expert: bool, ranks: int) -> Iterator[Buffer]:
        """Of each chunk, one for each dtype of its parameters."""
        itemsize, ddp = ITEMSIZE[self.config.model.precision], self.config.megatron.ddp
        reduced = ddp.get("grad_reduce_in_fp32", self.config.optimizer.main_grads_dtype == "fp32")
        for chunk in self.chunks:
            kinds: dict[bool, list[Parameter]] = {}
            for parameter in chunk:
                if parameter.expert == expert:
                    kinds.setdefault(parameter.fp8, []).append(parameter)
            for fp8, held in kinds.items():
                sizes = (ITEMSIZE["fp8"] if fp8 else itemsize, 4 if reduced else itemsize)
                yield Buffer(tuple(held), ranks, self._bucket_size(), *sizes, ddp.get("pad_buckets_for_high_nccl_busbw", False))

    def _bucket_size(self) -> int | None:
        """Elements; None for one bucket: on later stages, whose reduction nothing waits for, and where it does not overlap."""
        overlap = self.config.parallel.overlap_grad_reduce
        if self.number or not (overlap is None or overlap or self.config.parallel.overlap_param_gather):
            return None
        return self.config.megatron.ddp.get("bucket_size") or max(40_000_000, 1_000_000 * self.layout.dp)

    def _optimizer(self, buffers: list[Buffer], rank: int) -> tuple[int, int]:
        """Bytes on the GPU and on the host of the states that a rank owns."""
        settings, kept = self.config.optimizer, ITEMSIZE[self.config.model.precision] == 4
        if not settings.optimizer_cpu_offload:
            return sum(int(buffer.owned[rank]) for buffer in buffers) * _state(self.config), 0
        pieces = [piece for buffer in buffers for piece in buffer.pieces(rank)]
        away = offloaded(pieces, settings.optimizer_offload_fraction)
        # without the precision-aware optimizer Megatron's own float32 copies stay on the GPU, and the host has copies of them
        master = 0 if kept else MASTER
        stays = 0 if settings.use_precision_aware_optimizer else master
        return (sum(pieces) - away) * (master + MOMENTS) + away * stays, away * ON_HOST


def offloaded(pieces: list[int], fraction: float) -> int:
    """Elements that HybridDeviceOptimizer updates on the host: whole pieces, until the fraction is reached."""
    away, threshold = 0, sum(pieces) * fraction
    for piece in pieces:
        if away >= threshold:
            break
        away += piece
    return away


def _state(config: Config) -> int:
    """Bytes of the optimizer's state for an element of a parameter."""
    settings = config.optimizer
    if ITEMSIZE[config.model.precision] == 4:
        return MOMENTS  # the parameters are their own master copies
    if not settings.use_precision_aware_optimizer:
        return MASTER + MOMENTS
    return _master(config) + ITEMSIZE[settings.exp_avg_dtype] + ITEMSIZE[settings.exp_avg_sq_dtype]


def _master(config: Config) -> int:
    """Transformer Engine's FusedAdam keeps of a float32 copy only the 16 bits that the bf16 weight lacks; with scaled FP8 Megatron keeps
    the whole copy."""
    settings, model = config.optimizer, config.model
    full = ITEMSIZE[settings.main_params_dtype]
    own = full == 4 and model.fp8 and model.fp8_recipe != "delayed"
    remainders = config.megatron.optimizer.get("store_param_remainders", True) and model.precision in ("auto", "bf16")
    return 2 if full == 4 and remainders and not own else full

"""What a trainer's process holds on its GPU in each phase, the engine in the same process included, and what it keeps on its host."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_nft.config import Config
from megatron_nft.planner import activations
from megatron_nft.planner.activations import Micro
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.engine_memory import GIB, Engine
from megatron_nft.planner.holdings import ITEMSIZE, MASTER, MOMENTS, Stage
from megatron_nft.planner.parameters import table_of
from megatron_nft.planner.weight_stream import Stream
from megatron_nft.weights import Table

# A CUDA context with its kernels takes some 0.5 GiB on an H100, cuBLAS 32 MiB for each stream (torch's default on Hopper).
CONTEXT = int(0.6 * GIB)
# Of each NCCL communicator that is in use: buffers of every channel. NVIDIA/nccl issue 864 tells of 1.6 GB for one over two nodes and
# 6 GB for three and more, issue 1685 of 1.1 GB for the usual collectives of eight H100, vllm-project/vllm pull request 10511 of 1.8 GiB for
# all of two H100's. Less within a node and with fewer channels.
COMMUNICATOR = GIB // 2
# Of what comes and goes, lost between blocks: GMLake (ASPLOS 2024) measured 15 % in training on average. Lengths here are multiples of
# 128, which fit again.
FRAGMENTATION = 0.1
LEAVING = {  # train.offload: policy/offload.py
    "none": set(),
    "gradients": {"gradients"},
    "optimizer": {"gradients", "optimizer"},
    "all": {"gradients", "optimizer", "weights"},
}
ALL = {"gradients", "optimizer", "weights"}


@dataclass(frozen=True)
class Trainer:
    """The parts of the trainers' GPUs."""

    config: Config
    hf: dict
    layout: Layout
    engine: Engine
    stream: Stream

    @cached_property
    def stages(self) -> list[Stage]:
        """Of the pipeline."""
        return Stage.all(self.hf, self.config, self.layout)

    @cached_property
    def table(self) -> Table:
        """Of the model."""
        return table_of(self.hf)

    @property
    def served(self) -> bool:
        """Whether the engines have GPUs of their own."""
        return self.config.rollout.mode == "served"

    @property
    def leaving(self) -> set[str]:
        """What is off the GPU while answers are written."""
        return LEAVING[self.config.train.offload or "gradients"]

    def fullest(self, phase: str, slots: int) -> dict[str, int]:
        """The parts of a phase on the stage that needs most. slots: of a micro-batch in training."""
        return max((self._parts(phase, stage, slots) for stage in self.stages), key=lambda parts: sum(parts.values()))

    def _parts(self, phase: str, stage: Stage, slots: int) -> dict[str, int]:
        of = {
            "generate": self._generate,
            "old_logprobs": self._old_logprobs,
            "train": self._train,
            "sync": self._sync,
            "save": self._save,
        }
        parts = of[phase](stage, slots)
        return {name: nbytes for name, nbytes in (self._constant(stage) | parts).items() if nbytes}

    def _constant(self, stage: Stage) -> dict[str, int]:
        copies = activations.fp8_copies(stage, self.hf["num_hidden_layers"])
        return {"NCCL and CUDA": CONTEXT + COMMUNICATOR * len(list(self._communicators())), "FP8 copies of weights": copies}

    def _communicators(self) -> Iterator[int]:
        """Sizes of the groups that NCCL connects: those of Megatron with more than one rank, all ranks, and the engine's."""
        layout, experts = self.layout, self.layout.ep > 1
        world = layout.tp * layout.pp * layout.cp * layout.dp
        sizes = [layout.tp, layout.pp, layout.cp, layout.cp * layout.dp, world]
        sizes += [layout.ep, layout.ep * layout.etp, world // (layout.pp * layout.ep * layout.etp)] if experts else []
        sizes += [layout.pp if self.table.tied else 1]
        sizes += [0 if self.served else self.config.rollout.tensor_parallel_size]
        return (size for size in sizes if size > 1)

    # ---- phases

    def _resident(self, stage: Stage, kinds: set[str]) -> dict[str, int]:
        held = stage.fullest
        return {kind: getattr(held, kind) for kind in ("weights", "gradients", "optimizer") if kind in kinds}

    def _generate(self, stage: Stage, slots: int) -> dict[str, int]:
        return self._resident(stage, ALL - self.leaving) | ({} if self.served else self.engine.parts())

    def _old_logprobs(self, stage: Stage, slots: int) -> dict[str, int]:
        """Forward passes: parameters come back for them, nothing else does."""
        resident = self._resident(stage, (ALL - self.leaving) | {"weights"}) | self._sleeping
        if self.config.train.old_logprobs == "rollout":
            return resident
        micro = self._micro(max(slots, self.config.train.logprob_tokens_per_micro_batch or 0))
        return resident | self._passing(micro, stage, backward=False)

    def _train(self, stage: Stage, slots: int) -> dict[str, int]:
        return self._resident(stage, ALL) | self._sleeping | self._passing(self._micro(slots), stage, backward=True)

    def _sync(self, stage: Stage, slots: int) -> dict[str, int]:
        """The stream while the engine's KV cache is still away, or the cache, and the check of log-probs, while the parameters are still
        here: what takes more."""
        resident = self._resident(stage, (ALL - self.leaving) | {"weights"})
        if self.served:
            return resident | {"weight buckets": self.stream.peak}
        awake = self.engine.parts()
        cache, working = awake.pop("KV cache"), awake.pop("vLLM activations")
        coming = {"weight buckets": self.stream.peak, "vLLM layer being loaded": self.engine.loading}
        if sum(coming.values()) > cache + working:
            return resident | awake | coming
        return resident | self.engine.parts()

    def _save(self, stage: Stage, slots: int) -> dict[str, int]:
        """The optimizer's state comes back, and the engine sleeps where it had left; each bucket's is gathered from its owners in turn."""
        resident = self._resident(stage, (ALL - self.leaving) | {"weights", "optimizer"})
        buffers = [(size, buffer.ranks) for buffer in (*stage.dense, *stage.experts) for size in buffer.buckets if buffer.ranks > 1]
        gathered = max((MASTER * (size + size // ranks) for size, ranks in buffers), default=0)
        awake = {} if self.served else self.engine.parts()
        awake.pop("vLLM activations", None)  # no answer is being written
        return resident | (self._sleeping if "optimizer" in self.leaving else awake) | {"gathered for the save": gathered}

    @property
    def _sleeping(self) -> dict[str, int]:
        return {} if self.served else {"vLLM, asleep": self.engine.asleep}

    def _micro(self, slots: int) -> Micro:
        return Micro(self.table, self.config, self.layout, slots)

    def _passing(self, micro: Micro, stage: Stage, backward: bool) -> dict[str, int]:
        """What the passes over micro-batches need at their peak: in a layer, or at the head."""
        last = stage.number == self.layout.pp - 1
        kept = activations.kept(micro, stage) if backward else micro.residual
        layer = max(micro.working(number, backward) for number in self._kinds(stage)) + self._weight_gradient(stage) * backward
        layer += activations.made_again(micro, stage) if backward else 0
        head = micro.chunk(backward) if last else 0
        parts = {"activations": kept + (micro.head_states(backward) if last else 0)}
        parts |= {"log-prob chunks": head} if head > layer else {"work in a layer": layer}
        return parts | {"fragmentation": int(FRAGMENTATION * sum(parts.values()))}

    def _kinds(self, stage: Stage) -> set[int]:
        """A layer of each kind."""
        layers = {parameter.layer for chunk in stage.chunks for parameter in chunk if parameter.layer is not None}
        by_kind = {self.table.has_experts(layer): layer for layer in layers}
        return set(by_kind.values())

    def _weight_gradient(self, stage: Stage) -> int:
        """Bytes of the largest weight's gradient before it is added to the buffer."""
        return max(p.numel for chunk in stage.chunks for p in chunk if p.layer is not None) * ITEMSIZE[self.config.model.precision]

    # ---- the host

    def host(self, ranks: int) -> dict[str, int]:
        """Bytes of a node of so many ranks: the fullest stage's, on all of them."""
        each = max((self._on_host(stage) for stage in self.stages), key=lambda parts: sum(parts.values()))
        return {name: nbytes * ranks for name, nbytes in each.items() if nbytes}

    def _on_host(self, stage: Stage) -> dict[str, int]:
        """A rank keeps its copies for the next time. A checkpoint's state is put together whole on every rank, in float32, and what is
        written in the background is a copy of the weights besides."""
        held = stage.fullest
        away = sum(getattr(held, kind) for kind in self.leaving - {"gradients"})
        count, itemsize = stage.numel, ITEMSIZE[self.config.model.precision]
        staged = count * (MASTER + MOMENTS + itemsize)
        asleep = self.engine.weights if "optimizer" in self.leaving and not self.served else 0
        return {
            "updated on the host": held.host,
            "offloaded": away,
            "staged for a save": staged,
            "vLLM weights during a save": asleep,
        }


def server(trainer: Trainer) -> dict[str, int]:
    """The parts of a server's GPU, at the moment when new weights come: a bucket, and vLLM's copy of a layer."""
    communicators = 2 if trainer.config.rollout.tensor_parallel_size > 1 else 1  # its own, and the one with the trainer
    largest = max(load.nbytes for load in trainer.stream.buckets)
    return {
        "NCCL and CUDA": CONTEXT + COMMUNICATOR * communicators,
        **trainer.engine.parts(),
        "weight buckets": largest,
        "vLLM layer being loaded": trainer.engine.loading,
    }

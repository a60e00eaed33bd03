"""Seconds of the trainer's passes: an optimiser update, and the forward pass that makes old log-probs.

    update = m x slowest stage + (p - 1) / v x slowest stage + exposed communication + optimizer
    stage  = its layers x (matrix products + attention + what moves memory + exposed tensor-parallel collectives), head and loss on the last

m micro-batches a replica, p stages, v chunks of layers a stage (1F1B and its interleaved form, arXiv 2104.04473, section 2.2).
"""

import math
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_nft.batching import LENGTH_MULTIPLE, place
from megatron_nft.batching import Layout as Packing
from megatron_nft.config import Config
from megatron_nft.flops import attention_cost, attention_flops, linear_flops
from megatron_nft.planner import kernels
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.planner.communication import Group
from megatron_nft.planner.hardware import check_fp8
from megatron_nft.planner.workload import SEED, Workload
from megatron_nft.weights.layouts import Sizes, padded_vocab_size

KERNELS = (30, 55)  # that PyTorch starts in a layer: forward, backward (counted in Transformer Engine's layer with flash attention)
OVERLAPPED = 0.85  # of tensor-parallel collectives, with tp_comm_overlap: Transformer Engine's user buffers hide them behind the products
DRAWS = 4  # mini-batches of a step that are packed: how many micro-batches they have differs from one to the next
UPDATE_CALLS = 0.05  # seconds of an update that are none of the others: gradient norm, schedules, totals of the metrics
ADAM_BYTES = 34  # of a parameter: gradient, main parameter, two moments read; three of them and the BF16 parameter written; norm's pass
CPU_ADAM_RATE = 30e9  # bytes a second and GPU that the host's AdamW moves: 8 GPUs share two sockets' 350 to 600 GB/s, half of it reached
LOGIT_PASSES = (6, 10)  # times that the float32 logits are read or written: forward alone, with the gradient (policy/logprobs.py)


@dataclass(frozen=True)
class Shape:
    """Micro-batches of an update, as packing makes them of a seeded draw."""

    count: float  # a replica, on average over updates
    slots: float  # of each, over all context-parallel ranks
    tokens: float  # that count, of each
    squares: float  # sum of the squares of its sequences' lengths, on the slowest replica
    length: float  # of the sequence that a token is in, on average

    @classmethod
    def of(cls, lengths: np.ndarray, replicas: list[list[list[int]]], slots: int) -> "Shape":
        """Of one mini-batch. lengths: of answers with their prompts, by number; replicas: their numbers in each replica's micro-batches."""
        count, own = len(replicas[0]), lengths[[number for bins in replicas for members in bins for number in members]]
        tokens = float(own.sum()) / (len(replicas) * count)
        slowest = max(sum(float((lengths[members] ** 2).sum()) for members in bins) for bins in replicas)
        rest = slots - tokens  # the tail of a micro-batch is a sequence of its own
        return cls(count, slots, tokens, slowest / count + rest**2, float((own**2).sum() / own.sum()))

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token."""
        return self.tokens / self.slots


@dataclass
class Pass:
    """Seconds of a pass over micro-batches, by what they are spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def times(self, factor: float) -> "Pass":
        return Pass({name: factor * value for name, value in self.seconds.items()})

    def plus(self, other: "Pass") -> "Pass":
        joined = Pass(dict(self.seconds))
        for name, value in other.seconds.items():
            joined.add(name, value)
        return joined


PRODUCTS, ATTENTION, MEMORY, HEAD = "matrix products", "attention", "norms and activations", "head and loss"
TENSOR, CONTEXT, PIPELINE, DATA, EXPERT = (f"exposed: {kind} parallel" for kind in ("tensor", "context", "pipeline", "data", "expert"))
EXPOSED = (TENSOR, CONTEXT, PIPELINE, DATA, EXPERT)
BUBBLE, LAUNCHES, OPTIMIZER = "bubble", "launches", "optimizer"


class Training:
    """The trainer's time on a cluster, from settings alone."""

    def __init__(self, config: Config, hf: dict, cluster: Cluster):
        """Raises UserError for FP8 on a GPU that has none, and for a layout that does not divide the GPUs."""
        self.config, self.hf, self.cluster = config, hf, cluster
        self.gpu, self.sizes, self.layout = cluster.gpu, Sizes.of(hf), Layout.of(config, cluster)
        self.fp8 = config.model.fp8 is not None
        if self.fp8:
            check_fp8(self.gpu, "model.fp8")
        cut = self.layout
        self.tensor = Group(cut.tp, 1, cluster)
        self.context = Group(cut.cp, cut.tp, cluster)
        self.data = Group(cut.dp * cut.cp, cut.tp, cluster)
        self.stages = Group(cut.pp, cut.tp * cut.cp * cut.dp, cluster)
        self.experts = Group(cut.ep, cut.etp, cluster)

    # ---- micro-batches

    def shape(self, work: Workload) -> Shape:
        """Of an update: the packing of batching.place, on average over some mini-batches of drawn answers."""
        rng = np.random.default_rng(SEED)
        layout = self._packing(work.per_update)
        found = []
        for _ in range(min(DRAWS, work.updates)):
            lengths = work.prompt + work.draw(work.per_update * work.n, rng)
            lengths = np.minimum(lengths, layout.tokens_per_micro_batch // layout.sequence_multiple * layout.sequence_multiple)
            placed = place(np.arange(len(lengths)), lengths, layout)
            found.append(astuple(Shape.of(lengths, placed.micro_batches, placed.slots)))
        counts = np.array(found)[:, 0]
        return Shape(float(counts.mean()), *map(float, np.average(np.array(found)[:, 1:], axis=0, weights=counts)))

    def _packing(self, groups: int) -> Packing:
        cut = self.layout
        multiple = 2 * cut.cp if cut.cp > 1 else 1
        side = cut.cp * (cut.tp if cut.sequence_parallel else 1) * (16 if self.fp8 else 1)
        return Packing(
            cut.dp, self.config.train.tokens_per_micro_batch, groups, attention_cost(self.hf), math.lcm(LENGTH_MULTIPLE, multiple, side),
            cut.pp if cut.vpp > 1 else 1, multiple,
        )  # fmt: skip

    # ---- a layer

    def products(self, rows: float) -> list[tuple[float, float, float]]:
        """(rows, columns, depth) of a layer's matrix products on a rank."""
        sizes, tp = self.sizes, self.layout.tp
        attention = [(rows, (sizes.query + 2 * sizes.key) / tp, sizes.hidden), (rows, sizes.hidden, sizes.query / tp)]
        if not sizes.experts:
            return [*attention, (rows, 2 * sizes.ffn / tp, sizes.hidden), (rows, sizes.hidden, sizes.ffn / tp)]
        own, etp = sizes.experts // self.layout.ep, self.layout.etp
        each = rows * self.hf["num_experts_per_tok"] * self.layout.ep / sizes.experts * (1 if etp > 1 else 1 / tp)
        return attention + own * [(each, 2 * sizes.expert_ffn / etp, sizes.hidden), (each, sizes.hidden, sizes.expert_ffn / etp)]

    def _matrices(self, rows: float, backward: bool) -> float:
        """Backward: the gradients of the input and of the weight, which is added to the float32 gradient in memory."""
        gpu = self.gpu
        if not backward:
            return sum(kernels.matrix_product(gpu, m, n, k, self.fp8) for m, n, k in self.products(rows))
        inputs = sum(kernels.matrix_product(gpu, m, k, n, self.fp8) for m, n, k in self.products(rows))
        weights = sum(kernels.matrix_product(gpu, k, n, m, self.fp8) for m, n, k in self.products(rows))
        return inputs + weights + kernels.moved(gpu, sum(8 * n * k for _, n, k in self.products(rows)))

    def _channels(self) -> tuple[float, float, float]:
        """(hidden as norms see it, projections, inner) channels of a token on a rank."""
        sizes, tp = self.sizes, self.layout.tp
        inner = sizes.expert_ffn * self.hf["num_experts_per_tok"] if sizes.experts else sizes.ffn
        return sizes.hidden / (tp if self.layout.sequence_parallel else 1), (sizes.query + 2 * sizes.key) / tp, inner / tp

    def _memory(self, rows: float, backward: bool) -> float:
        """Norms and residuals (read and written: 5 x hidden each), rotation (2 x projections), gate (3 x inner), in 16 bits; the backward
        pass moves twice as much. FP8: an operand is read for its largest value, and again to be cast, as it is and transposed (6 bytes)."""
        hidden, projections, inner = self._channels()
        nbytes = 2 * rows * (10 * hidden + 2 * projections + 3 * inner) * (2 if backward else 1)
        if self.fp8:
            full = self.sizes.hidden
            operands = projections + full + 2 * inner + hidden if backward else full + projections + hidden + inner
            nbytes += 6 * rows * operands
        return kernels.moved(self.gpu, nbytes)

    def _attention(self, shape: Shape, backward: bool) -> float:
        sizes, cut = self.sizes, self.layout
        channels = sizes.query / cut.tp
        return kernels.attention(self.gpu, shape.squares / cut.cp, channels, shape.length / cut.cp, backward)

    def _tensor(self, rows: float, backward: bool) -> float:
        """Exposed seconds of tensor-parallel collectives. Sequence parallel: an all-gather before and a reduce-scatter after attention and
        MLP each. In the backward pass the gather of the saved input and the reduce-scatter run beside products of weights' gradients; with
        tp_comm_overlap nearly all of them are hidden. Without sequence parallel: two all-reduces, the backward ones beside products."""
        nbytes = 2 * rows * self.sizes.hidden
        whole = 4 * self.tensor.gather(nbytes)
        if backward and not self._overlaps_tensor:
            whole = whole / 2 if self.layout.sequence_parallel else whole / 4
        return whole * (1 - OVERLAPPED) if self._overlaps_tensor else whole

    @property
    def _overlaps_tensor(self) -> bool:
        return bool(self.config.megatron.transformer.get("tp_comm_overlap"))

    def _context(self, rows: float, attention: float, backward: bool) -> float:
        """What of the ring of keys and values attention does not hide."""
        cut = self.layout
        nbytes = 2 * rows * 2 * self.sizes.key / cut.tp * (2 if backward else 1)
        return max(0.0, (cut.cp - 1) * self.context.send(nbytes) - attention * (cut.cp - 1) / cut.cp)

    def _expert(self, rows: float) -> float:
        """Tokens to their experts and back."""
        if self.layout.ep == 1:
            return 0.0
        shared = self.layout.tp if self.layout.sequence_parallel else 1
        nbytes = 2 * rows / shared * self.sizes.hidden * self.hf["num_experts_per_tok"]
        return 2 * self.experts.gather(nbytes)

    def layer(self, shape: Shape, backward: bool) -> Pass:
        """One layer, one micro-batch, one direction; nothing recomputed."""
        rows, found = shape.slots / self.layout.cp, Pass()
        attention = self._attention(shape, backward)
        found.add(PRODUCTS, self._matrices(rows, backward))
        found.add(ATTENTION, attention)
        found.add(MEMORY, self._memory(rows, backward))
        found.add(TENSOR, self._tensor(rows, backward))
        found.add(CONTEXT, self._context(rows, attention, backward))
        found.add(EXPERT, self._expert(rows))
        found.add(LAUNCHES, max(0.0, KERNELS[backward] * self.gpu.achieved.launch - found.total))
        return found

    def recomputed(self, shape: Shape) -> Pass:
        """What the backward pass makes again of one layer, on average over a stage's layers."""
        train, forward = self.config.train, self.layer(shape, False)
        if train.recompute_granularity == "full":
            layers = self.sizes.layers / (self.layout.pp * self.layout.vpp)
            block = train.recompute_method == "block"
            return forward.times(min(1.0, (train.recompute_num_layers or 1) / layers) if block else 1.0)
        again = Pass()
        if train.recompute_granularity == "selective":
            modules = train.recompute_modules or ["core_attn"]
            rows = shape.slots / self.layout.cp
            if "core_attn" in modules:
                again.add(ATTENTION, forward.seconds[ATTENTION])
            if "mlp" in modules or "moe" in modules:
                mlp = self.products(rows)[2:]
                again.add(PRODUCTS, sum(kernels.matrix_product(self.gpu, *product, self.fp8) for product in mlp))
                again.add(TENSOR, forward.seconds[TENSOR] / 2)
            if {"mlp", "moe", "layernorm", "moe_act"} & set(modules):
                again.add(MEMORY, forward.seconds[MEMORY] / 2)
        return again

    # ---- the head

    def head(self, shape: Shape, backward: bool) -> Pass:
        """Log-probs of the tokens that count, chunk by chunk, float32 logits; with the gradient: two products more. In 16 bits also with
        model.fp8. The embedding is a look-up."""
        cut, sizes = self.layout, self.sizes
        rows, columns = shape.tokens / cut.cp, padded_vocab_size(sizes.vocabulary, cut.tp) / cut.tp
        product = kernels.matrix_product(self.gpu, rows, columns, sizes.hidden)
        passes = 4 * rows * columns * LOGIT_PASSES[backward]
        return Pass({HEAD: product * (3 if backward else 1) + kernels.moved(self.gpu, passes)})

    # ---- passes over the micro-batches of a replica

    def _slowest_stage(self, shape: Shape, backward: bool) -> Pass:
        """A micro-batch on the slowest of all stages: the last one, where the layers are spread evenly, for it has the head."""
        layers = self.sizes.layers / self.layout.pp
        found = self.layer(shape, False).times(layers)
        if backward:
            found = found.plus(self.layer(shape, True).times(layers)).plus(self.recomputed(shape).times(layers))
        return found.plus(self.head(shape, backward))

    def _through_stages(self, shape: Shape, count: int, backward: bool) -> Pass:
        """`count` micro-batches through the pipeline, with its bubble and what it does not hide of its messages."""
        cut, stage = self.layout, self._slowest_stage(shape, backward)
        found = stage.times(count)
        if cut.pp > 1:
            found.add(BUBBLE, (cut.pp - 1) / cut.vpp * stage.total)
            message = self.stages.send(self.bytes_of_message(shape))
            ways = 2 if backward else 1
            # interleaved: messages run beside the chunks, but for those of the filling; otherwise every one is waited for
            found.add(PIPELINE, ways * message * ((cut.pp - 1) if cut.vpp > 1 else (count + cut.pp - 1)))
        return found

    def bytes_of_message(self, shape: Shape) -> float:
        """Hidden states of a micro-batch from one stage to the next, of a rank."""
        cut = self.layout
        return 2 * shape.slots / cut.cp * self.sizes.hidden / (cut.tp if cut.sequence_parallel else 1)

    @cached_property
    def parameters(self) -> float:
        """Of the fullest rank: its layers' share, and the head (or, on the first stage, the embedding; both on a single stage)."""
        sizes, cut = self.sizes, self.layout
        experts = 3 * sizes.hidden * sizes.expert_ffn * sizes.experts / (cut.ep * cut.etp)
        dense = 0 if sizes.experts else 3 * sizes.hidden * sizes.ffn
        attention = sizes.hidden * (2 * sizes.query + 2 * sizes.key)
        tables = (1 if sizes.tied or cut.pp > 1 else 2) * sizes.vocabulary * sizes.hidden
        return ((attention + dense) / cut.tp + experts) * sizes.layers / cut.pp + tables / cut.tp

    @property
    def gradient_bytes(self) -> float:
        """Reduced and scattered by an update, of a rank."""
        return self.parameters * (4 if self.config.optimizer.main_grads_dtype == "fp32" else 2)

    @property
    def parameter_bytes(self) -> float:
        """Gathered by an update, of a rank."""
        return self.parameters * (1 if self.config.model.fp8_param_gather and self.fp8 else 2)

    def _data(self, shape: Shape) -> float:
        """What an update does not hide of reducing gradients and gathering parameters. Gradients: behind the last micro-batch's backward
        pass; parameters: behind the next update's first forward pass. The last bucket of each stays exposed."""
        parallel, stage = self.config.parallel, self.sizes.layers / self.layout.pp
        reduce, gather = self.data.gather(self.gradient_bytes), self.data.gather(self.parameter_bytes)
        if parallel.overlap_grad_reduce is not False:
            hidden = self.layer(shape, True).times(stage).total
            reduce = max(reduce / max(stage, 1), reduce - hidden)
        if parallel.overlap_param_gather:
            hidden = self.layer(shape, False).times(stage).total
            gather = max(gather / max(stage, 1), gather - hidden)
        return reduce + gather

    def _optimizer(self) -> float:
        """AdamW on a rank's share of the parameters: on the GPU bound by its memory, on the host by the host's, with the way there."""
        own, optimizer = self.parameters / self.data.size, self.config.optimizer
        away = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0
        here = kernels.moved(self.gpu, own * (1 - away) * ADAM_BYTES)
        link = self.gpu.host * self.gpu.achieved.host
        return here + own * away * (ADAM_BYTES / CPU_ADAM_RATE + 8 / link) + UPDATE_CALLS

    def update(self, shape: Shape) -> Pass:
        """One optimiser update."""
        found = self._through_stages(shape, shape.count, backward=True)
        found.add(DATA, self._data(shape))
        found.add(OPTIMIZER, self._optimizer())
        return found

    def old_logprobs(self, shape: Shape, updates: int) -> Pass:
        """The forward pass that makes them for the mini-batches after the first (the first update makes its own: trainer.py)."""
        if self.config.train.old_logprobs == "rollout" or updates < 2:
            return Pass()
        room = int((self.config.train.logprob_tokens_per_micro_batch or 0) // shape.slots)
        joined = max(room, 1)
        together = replace(shape, slots=shape.slots * joined, tokens=shape.tokens * joined, squares=shape.squares * joined)
        return self._through_stages(together, math.ceil(shape.count * (updates - 1) / joined), backward=False)

    # ---- figures

    def model_flops(self, tokens: float, squares: float) -> float:
        """Of a forward and a backward pass, nothing recomputed, over all GPUs."""
        return 3 * (linear_flops(self.hf) * tokens + attention_flops(self.hf) * squares)

    def bytes_of_collectives(self, shape: Shape) -> dict[str, float]:
        """What a rank sends in an update, by kind."""
        cut, sizes = self.layout, self.sizes
        rows, layers = shape.slots / cut.cp, sizes.layers / cut.pp
        share = lambda size: (size - 1) / size  # noqa: E731
        gathers = 9 if cut.sequence_parallel else 8  # one gather of the saved input more
        return {
            "tensor": gathers * layers * shape.count * 2 * rows * sizes.hidden * share(cut.tp),
            "context": (cut.cp - 1) * 3 * layers * shape.count * 4 * rows * sizes.key / cut.tp,
            "pipeline": 2 * cut.vpp * shape.count * self.bytes_of_message(shape) * (cut.pp > 1),
            "data": (self.gradient_bytes + self.parameter_bytes) * share(self.data.size),
        }

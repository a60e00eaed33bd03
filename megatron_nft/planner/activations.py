"""What a training step's activations take on a GPU: kept from the forward pass for the backward one, and worked with at its peak.

Layers are Transformer Engine's, whose attention keeps no scores: the s^2 term of arXiv 2205.05198 is gone. Without sequence parallelism,
in bf16 and with an MLP as wide as GPT's, a layer keeps that paper's 34 s b h but for the 2 s b h of two dropout masks.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_nft.config import Config, TrainConfig
from megatron_nft.planner.cluster import Layout
from megatron_nft.planner.holdings import ITEMSIZE, Stage
from megatron_nft.planner.parameters import is_fp8, layers_of
from megatron_nft.weights import Table

CHUNK_BYTES = 2**29  # of float32 logits that log-probs are made from at a time: policy/logprobs.py
STATISTIC = 4  # bytes of a norm's, and of a softmax's, float32 number a token


@dataclass(frozen=True)
class Micro:
    """A micro-batch on one rank."""

    table: Table
    config: Config
    layout: Layout
    slots: int  # of it, over the context-parallel ranks

    @property
    def tokens(self) -> int:
        """Of this context-parallel rank."""
        return -(-self.slots // self.layout.cp)

    @property
    def own(self) -> int:
        """Tokens whose residual this rank has: with sequence parallelism the tensor-parallel ranks share them."""
        return -(-self.tokens // self.layout.tp) if self.layout.sequence_parallel else self.tokens

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return ITEMSIZE[self.config.model.precision]

    @property
    def residual(self) -> int:
        """Bytes of the hidden states between two layers."""
        return self.own * self.table.sizes.hidden * self.itemsize

    @property
    def routed(self) -> int:
        """Tokens in this rank's experts, each counted for every expert that has it, where all experts have equally many."""
        return self.own * self.table.config["num_experts_per_tok"] * self.layout.etp

    # ---- of one layer, kept for the backward pass

    def kept(self, layer: int) -> int:
        """Bytes of a layer that are kept: train.recompute_modules are not."""
        again = modules(self.config.train)
        return sum(nbytes for part, nbytes in self.parts(layer).items() if part not in again)

    def parts(self, layer: int) -> dict[str, int]:
        """Bytes by the module that would make them again; "" for what no module does. A layer's input is among them."""
        kind = self.table.has_experts(layer), self._in_fp8(layer, "linear_qkv.weight")  # many layers, few kinds
        if kind not in self._known:
            self._known[kind] = self._attention(layer) | (self._experts(layer) if kind[0] else self._mlp(layer))
        return self._known[kind]

    @cached_property
    def _known(self) -> dict[tuple[bool, bool], dict[str, int]]:
        return {}

    def _attention(self, layer: int) -> dict[str, int]:
        sizes, tp, size = self.table.sizes, self.layout.tp, self.itemsize
        query, key = sizes.query // tp, sizes.key // tp
        norm = self.residual + self.own * STATISTIC + self._stored(layer, "linear_qkv.weight", self.own * sizes.hidden)
        qkv = self.tokens * (query + 2 * key) * size
        normed = self.tokens * (query + key) * size if self.table.qk_norm else 0
        output = self.tokens * query * (size + (1 if self._in_fp8(layer, "linear_proj.weight") else 0))
        return {"": norm + qkv + normed + output, "core_attn": self.tokens * sizes.heads // tp * STATISTIC}

    def _mlp(self, layer: int) -> dict[str, int]:
        sizes = self.table.sizes
        ffn = sizes.ffn // self.layout.tp
        norm = self._stored(layer, "linear_fc1.weight", self.own * sizes.hidden)  # in the same module as the first weight
        gate_up = self.tokens * 2 * ffn * self.itemsize
        inner = self._stored(layer, "linear_fc2.weight", self.tokens * ffn)
        return {"residual": self.residual + self.own * STATISTIC, "mlp": norm + gate_up + inner}

    def _experts(self, layer: int) -> dict[str, int]:
        sizes = self.table.sizes
        ffn = sizes.expert_ffn // self.layout.etp
        scores = 2 * self.own * sizes.experts * STATISTIC  # logits and probabilities
        rows = self._stored(layer, "linear_fc1.weight", self.routed * sizes.hidden)
        gate_up = self.routed * 2 * ffn * self.itemsize
        return {
            "residual": self.residual + self.own * STATISTIC,
            "layernorm": self.residual,  # its norm stands alone
            "moe": scores + rows + gate_up,
            "moe_act": self._stored(layer, "linear_fc2.weight", self.routed * ffn),
        }

    def _stored(self, layer: int, weight: str, elements: int) -> int:
        """Bytes of a linear layer's input as it is kept for the weight's gradient."""
        return elements * (1 if self._in_fp8(layer, weight) else self.itemsize)

    def _in_fp8(self, layer: int, weight: str) -> bool:
        return is_fp8(f"decoder.layers.{layer}.{weight}", self.config, self.table.sizes.layers)

    # ---- at the peak

    def working(self, layer: int, backward: bool) -> int:
        """Bytes that a layer works with and frees: of the MLP, where most is alive. Backward: gradients of what it made."""
        sizes = self.table.sizes
        gathered = 2 * self.tokens * sizes.hidden * self.itemsize
        if self.table.has_experts(layer):
            inner, gathered = self.routed * 3 * sizes.expert_ffn // self.layout.etp, 3 * self.routed * sizes.hidden * self.itemsize
        else:
            inner = self.tokens * 3 * sizes.ffn // self.layout.tp
        exchanged = self.tokens * (4 * sizes.key + 2 * sizes.query) // self.layout.tp * self.itemsize  # keys and values on their way round
        ring = exchanged if self.layout.cp > 1 else 0
        return inner * self.itemsize + gathered + (2 if backward else 3) * self.residual + ring

    def chunk(self, backward: bool) -> int:
        """Bytes of the head's work in chunks: float32 logits, their 16-bit copy and the float32 gradient of the weight, twice while a
        chunk's is added."""
        rows = self.head_rows
        part = min(max(CHUNK_BYTES // (rows * STATISTIC), 1), self.tokens)
        logits = part * rows * STATISTIC * 17 // 16  # entropies are made of a sixteenth of the rows at a time
        if not backward:
            return logits
        return logits + part * rows * self.itemsize + 2 * rows * self.table.sizes.hidden * STATISTIC

    def head_states(self, backward: bool) -> int:
        """Bytes of the last hidden states: normed, gathered, of the tokens that count, and the gradient."""
        whole = self.tokens * self.table.sizes.hidden * self.itemsize
        return 2 * self.residual + (3 if backward else 2) * whole

    @property
    def head_rows(self) -> int:
        """Of the head's weight on a rank."""
        return self.table.shard_shape("output_layer.weight", self.layout.tp)[0]


def modules(train: TrainConfig) -> set[str]:
    """What train.recompute_modules makes again of a layer. With a mixture's `moe` all of its parts; the norm before a dense MLP is a part
    of the MLP's first layer, which `layernorm` does not reach."""
    if train.recompute_granularity != "selective":
        return set()
    named = set(train.recompute_modules or ["core_attn"])
    return named | {"moe_act"} if "moe" in named else named


def in_flight(layout: Layout, stage: int) -> int:
    """Micro-batches (interleaved: a chunk's part of one) whose activations a stage keeps at a time, in Megatron's schedules."""
    if layout.vpp == 1:
        return layout.pp - stage
    return 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1


def kept(micro: Micro, stage: Stage) -> int:
    """Bytes of activations that a stage keeps at its fullest: those of all micro-batches in flight."""
    config, layout = micro.config, micro.layout
    of_chunks = [_of_chunk(micro, layers_of(micro.table.config, layout, stage.number, chunk), config.train) for chunk in range(layout.vpp)]
    output = micro.residual if layout.pp > 1 else 0  # what was sent on: Megatron frees it with its gradient
    return in_flight(layout, stage.number) * (max(of_chunks) + output)


def _of_chunk(micro: Micro, layers: range, train: TrainConfig) -> int:
    if train.recompute_granularity != "full":
        return sum(map(micro.kept, layers))
    count = train.recompute_num_layers or 1
    if train.recompute_method == "block":
        return min(count, len(layers)) * micro.residual + sum(micro.kept(layer) for layer in layers[count:])
    return -(-len(layers) // count) * micro.residual


def made_again(micro: Micro, stage: Stage) -> int:
    """Bytes that the backward pass makes again at a time: a run of layers, or the modules of one."""
    train, layout = micro.config.train, micro.layout
    layers = [layer for chunk in range(layout.vpp) for layer in layers_of(micro.table.config, layout, stage.number, chunk)]
    whole = {layer: sum(micro.parts(layer).values()) for layer in layers}
    if train.recompute_granularity == "full":
        return max(whole.values()) * (1 if train.recompute_method == "block" else train.recompute_num_layers or 1)
    return max(whole[layer] - micro.kept(layer) for layer in layers)


def fp8_copies(stage: Stage, layers: int) -> int:
    """Bytes of what Transformer Engine keeps of weights that it multiplies in FP8: them and their transposes; the latter alone where they
    are kept in FP8."""
    copies = 1 if stage.config.model.fp8_param_gather else 2
    held = (parameter for chunk in stage.chunks for parameter in chunk if is_fp8(parameter.name, stage.config, layers))
    return copies * sum(parameter.numel for parameter in held)

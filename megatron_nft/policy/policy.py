"""The model that is trained: log-probs, updates, weights out, save and load. Everything here runs on every rank."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nft.batching import Plan, TrainingAnswer, pack
from megatron_nft.config import Config, ObjectiveConfig
from megatron_nft.errors import UserError
from megatron_nft.objectives import MISMATCH, Inputs, correction, summarize_mismatch
from megatron_nft.policy import checkpoint, exchange, logprobs, model, optimizer, versions
from megatron_nft.policy.offload import LEVELS, Offload
from megatron_nft.policy.topology import Topology, device
from megatron_nft.trajectories import Batch, Group
from megatron_nft.weights import HuggingFaceWeights, load_huggingface, read_json, save_huggingface, stream, table_for

Objective = Callable[[Inputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Policy:
    """A Megatron-Core GPTModel with its optimizer, loaded from the Hugging Face directory config.model.path."""

    def __init__(self, config: Config, topology: Topology, trainable: bool = True, weights: bool = True):
        """trainable=False leaves out gradients and optimizer (conversion, parity checks). weights=False leaves the weights unset, for
        load() to fill: config.model.path then needs no more than a config.json."""
        self.config, self.topology = config, topology
        self.temperature = config.rollout.temperature  # log-probs are of the distribution that is sampled from
        source = load_huggingface(config.model.path) if weights else None
        self.hf = source.config if source else read_json(Path(config.model.path) / "config.json")
        self.table = table_for(self.hf)
        first, last = topology.pipeline_rank == 0, topology.is_last_stage
        self.module = model.build(self.hf, config, pre_process=first, post_process=last)
        if source:
            self._fill(source)
        self.chunk, self._offload = self.module, None
        if trainable:
            self.chunk = optimizer.wrap(self.module, config)
            self.optimizer, self.scheduler = optimizer.make(self.chunk, config)
            self._offload = Offload([self.chunk], self.optimizer)
            self.module.config.grad_scale_func = self.optimizer.scale_loss
            self.module.config.finalize_model_grads_func = _sum_gradients
            self.module.config.no_sync_func = self.chunk.no_sync  # only the last micro-batch of an update starts the reduction

    # ---- batches

    def receive(self, groups: list[Group], numbers: list[int], plan: Plan) -> list[list[Batch]]:
        """Exchange answers between ranks as the plan says; returns this rank's micro-batches of every mini-batch."""
        return self.pack(plan, exchange.exchange(groups, numbers, plan, self.topology))

    def pack(self, plan: Plan, answers: dict[int, TrainingAnswer]) -> list[list[Batch]]:
        """This rank's micro-batches of every mini-batch, from answers it holds by their number in the plan."""
        tokens = self.config.train.tokens_per_micro_batch
        mine = [mini.micro_batches[self.topology.data_rank] for mini in plan.mini_batches]
        return [[_to_device(pack(members, answers, plan, tokens)) for members in batches] for batches in mine]

    # ---- log-probs and updates

    def fill_old_logprobs(self, batches: list[Batch], settings: ObjectiveConfig) -> dict[str, float]:
        """Set old_logprobs of every micro-batch to this model's log-probs, and the correction of a sampler that differs from them (both
        on the last pipeline stage, where they are used).

        Returns over all ranks: mean entropy of a token, in nats, and what objectives.summarize_mismatch tells.
        """

        def collect(output, batch: Batch):
            values, entropy = self._logprobs(output, batch, with_entropy=True)
            batch.old_logprobs = values.float()
            batch.correction, sums = correction(batch.old_logprobs, batch.sampler_logprobs, batch.loss_mask, batch.answer_index, settings)
            return values.sum() * 0.0, torch.zeros((), dtype=torch.int), sums | {"entropy": (entropy * batch.loss_mask).sum()}

        with torch.no_grad():
            sums = self._totals(self._run(batches, collect, forward_only=True), [*MISMATCH, "entropy"])
        return {"entropy": sums["entropy"] / max(sums["mismatch_count"], 1.0), **summarize_mismatch(sums)}

    def copy_old_logprobs(self, batches: list[Batch]) -> None:
        """Take the sampler's log-probs for pi_old (`old_logprobs: rollout`)."""
        for batch in batches:
            batch.old_logprobs = batch.sampler_logprobs

    def update(self, batches: list[Batch], objective: Objective, names: list[str]) -> dict[str, float]:
        """One optimiser step on a mini-batch, given as this rank's micro-batches (equally many on every rank).

        names: the objective's metrics; their totals over all micro-batches and ranks are returned, with loss, grad_norm
        (before clipping) and lr. With fp16 also the loss_scale for the next update, and where the gradients overflowed there is no
        grad_norm and no step, as Megatron has it: parameters, moments and the schedule stay.
        """

        def loss_of(output, batch: Batch):
            values, _ = self._logprobs(output, batch)
            inputs = Inputs(values, batch.old_logprobs, batch.verdict, batch.correct_rate, batch.weight, batch.scale,
                            batch.correction, batch.loss_mask, batch.answer_index)  # fmt: skip
            loss, metrics = objective(inputs)
            return loss, torch.zeros((), dtype=torch.int), {"loss": loss.detach(), **metrics}

        self._come_back()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batches, loss_of, forward_only=False)
        self.scheduler.step(increment=1)  # before the update, so that the first one of a warm-up has a learning rate
        lr = self.optimizer.param_groups[0]["lr"]
        applied, grad_norm, _ = self.optimizer.step()
        if not applied:
            self.scheduler.step(increment=-1)
        totals = {**self._totals(results, ["loss", *names]), "lr": lr}
        if applied:
            totals["grad_norm"] = float(grad_norm)
        if self.module.config.fp16:
            totals["loss_scale"] = float(self.optimizer.get_loss_scale())
        return totals

    def _run(self, batches: list[Batch], on_output, forward_only: bool) -> list[dict]:
        """Megatron's pipeline schedule over the micro-batches; on_output(output, batch) on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if forward_only:
            self._gather_parameters()
        return get_forward_backward_func()(
            forward_step_func=lambda iterator, chunk: self._forward(next(iterator), chunk, on_output),
            data_iterator=iter(batches),
            model=[self.chunk],
            num_microbatches=len(batches),
            seq_length=len(batches[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _gather_parameters(self) -> None:
        """overlap_param_gather leaves the last update's parameters to the next update's forward pass; anyone else gathers them first."""
        self._come_back()
        if self.chunk is not self.module and self.chunk.ddp_config.overlap_param_gather:
            self.chunk.start_param_sync(force_sync=True)

    def _forward(self, batch: Batch, chunk, on_output):
        from megatron.core.packed_seq_params import PackedSeqParams

        packed = PackedSeqParams("thd", batch.cu_seqlens, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen)
        output = chunk(batch.tokens[None], batch.positions[None], None, packed_seq_params=packed)
        return output, partial(on_output, batch=batch)

    def _logprobs(self, output: torch.Tensor, batch: Batch, with_entropy=False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [1, tokens (/tp), hidden] -> log-prob (and entropy) of the targets [tokens], zero where the mask is."""
        from megatron.core import parallel_state, tensor_parallel

        hidden, group = output[0], parallel_state.get_tensor_model_parallel_group()
        if self.config.parallel.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        counted = batch.loss_mask.nonzero()[:, 0]
        args = model.head_weight(self.module), self.hf["vocab_size"], self.temperature, group
        weight, *rest = args
        values = logprobs.logprobs(hidden[counted], weight, batch.targets[counted], *rest)
        full = values.new_zeros(len(batch.tokens)).index_put((counted,), values)
        if not with_entropy:
            return full, None
        entropy = logprobs.entropies(hidden[counted], weight, *rest)
        return full, entropy.new_zeros(len(batch.tokens)).index_put((counted,), entropy)

    def _totals(self, results: list[dict[str, torch.Tensor]], names: list[str]) -> dict[str, float]:
        """Sums of the last stage's metrics over micro-batches and replicas, on every rank; maxima for names ending in _max."""
        mine = self.topology.is_last_stage and self.topology.tensor_rank == 0
        totals = {}
        for reduce, op in ((torch.sum, dist.ReduceOp.SUM), (torch.amax, dist.ReduceOp.MAX)):
            kind = [n for n in names if n.endswith("_max") == (reduce is torch.amax)]
            local = torch.zeros(len(kind), dtype=torch.float64, device=device())
            if mine and results:
                local = torch.stack([reduce(torch.stack([r[n].double() for r in results])) for n in kind]) if kind else local
            dist.all_reduce(local, op)
            totals.update(zip(kind, local.tolist()))
        return totals

    # ---- memory

    def offload(self) -> None:
        """Move what config.train.offload names off the device. Whatever needs it next brings it back, bit for bit."""
        self._offload.leave(LEVELS[self.config.train.offload])

    def hand_over(self) -> Iterator[tuple[str, torch.Tensor]]:
        """weights() for a sampler on the same device: all but the parameters leaves first. They leave by offload() when the sampler is done
        with the stream: vLLM keeps views of its last tensors beyond the end."""
        self._gather_parameters()
        self._offload.leave(kind for kind in LEVELS[self.config.train.offload] if kind != "parameters")
        yield from self._stream()

    def _come_back(self) -> None:
        if self._offload is not None:
            self._offload.come_back()

    # ---- weights

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under its Hugging Face name, full, on every rank; a collective: exhaust it on all ranks."""
        self._gather_parameters()
        return self._stream()

    def _stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        from megatron.core import parallel_state

        named = ((name, versions.values_of(parameter)) for name, parameter in self._named_parameters() if not self._is_tied_copy(name))
        tp, pp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
        return stream(named, self.table, tp, pp)

    def export(self, directory: Path) -> None:
        """Write, or replace, a Hugging Face directory, with the config and tokenizer files of config.model.path. Collective."""
        tensors = self.weights()
        if self.topology.is_first:
            save_huggingface(directory, tensors, self.config.model.path, replace=True)
        else:
            for _ in tensors:
                pass
        dist.barrier()

    @torch.no_grad()
    def _fill(self, source: HuggingFaceWeights) -> None:
        for name, parameter in self._named_parameters():
            wanted = "embedding.word_embeddings.weight" if self._is_tied_copy(name) else name
            full = self.table.to_megatron(wanted, source.get)
            local = self.table.shard(wanted, full, self.topology.tensor_rank, self.topology.tensor_size)
            if local.shape != parameter.shape:
                raise UserError(
                    f"{name} is {tuple(local.shape)} in {source.directory}, the config asks for {tuple(parameter.shape)}",
                    "check config.json",
                )
            versions.set_values(parameter, local)

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of this stage, with global layer numbers."""
        offset = self.module.decoder.layers[0].layer_number - 1 if len(self.module.decoder.layers) else 0
        for name, parameter in self.module.named_parameters():
            yield re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + offset}.", name), parameter

    def _is_tied_copy(self, name: str) -> bool:
        """The last pipeline stage's own copy of a tied embedding."""
        return name == "output_layer.weight" and self.module.share_embeddings_and_output_weights

    # ---- checkpoints

    def save(self, directory: Path, state: dict) -> None:
        """Write a complete checkpoint: model, optimizer, scheduler, RNG, and `state` (JSON) in the manifest."""
        self._gather_parameters()
        checkpoint.save(directory, self, state)

    def load(self, directory: Path) -> dict:
        """Fill model, optimizer, scheduler and RNG from a checkpoint; returns its `state`."""
        self._come_back()
        return checkpoint.load(directory, self)


def _sum_gradients(chunks, num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reduction without its division by a token count: the loss carries its own denominators."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(chunks, None, **kwargs)


def _to_device(batch: Batch) -> Batch:
    moved = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{name: value.to(device()) if torch.is_tensor(value) else value for name, value in moved.items()})

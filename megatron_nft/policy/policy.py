"""The model that is trained: log-probs, updates, weights out, save and load. Everything here runs on every rank."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nft import watchdog
from megatron_nft.batching import Layout, Plan, TrainingAnswer, join, pack, split
from megatron_nft.config import Config, ObjectiveConfig
from megatron_nft.errors import UserError
from megatron_nft.objectives import MEASURED
from megatron_nft.policy import checkpoint, context, deterministic, exchange, losses, micro_batches, model, optimizer, versions
from megatron_nft.policy.busy import Busy
from megatron_nft.policy.logprobs import Head
from megatron_nft.policy.losses import Objective
from megatron_nft.policy.names import is_tied_copy, numbered
from megatron_nft.policy.offload import LEVELS, Offload
from megatron_nft.policy.topology import Topology, device
from megatron_nft.policy.watch import Watch
from megatron_nft.trajectories import Batch, Group
from megatron_nft.weights import (
    Bucket,
    Buffers,
    HuggingFaceWeights,
    TorchDistWeights,
    expert_number,
    load_weights,
    read_json,
    save_huggingface,
    stream,
    table_for,
)


class Policy:
    """A Megatron-Core GPTModel with its optimizer, loaded from config.model.path: a Hugging Face directory, or a checkpoint."""

    def __init__(self, config: Config, topology: Topology, trainable: bool = True, weights: bool = True):
        """trainable=False leaves out gradients and optimizer (conversion, parity checks). weights=False leaves the weights unset, for
        load() to fill: config.model.path then needs no more than a config.json."""
        self.config, self.topology = config, topology
        deterministic.prepare(config)
        self._saver = checkpoint.Saver()
        self._busy = Busy()
        self.temperature = config.rollout.temperature  # log-probs are of the distribution that is sampled from
        source = load_weights(config.model.path) if weights else None
        self.hf = source.config if source else read_json(Path(config.model.path) / "config.json")
        self.table = table_for(self.hf)
        self.modules = model.build(self.hf, config)  # one GPTModel, or the chunks of an interleaved pipeline
        if source:
            self._fill(source)
        self.chunks, self._offload, self._buffers = self.modules, None, Buffers()
        if trainable:
            self.chunks = [optimizer.wrap(module, config) for module in self.modules]
            self.optimizer, self.scheduler = optimizer.make(self.chunks, config)
            self._offload = Offload(self.chunks, self.optimizer)
            settings, waits = self.module.config, [chunk.no_sync for chunk in self.chunks]
            settings.grad_scale_func = self.optimizer.scale_loss
            settings.finalize_model_grads_func = _sum_gradients
            settings.no_sync_func = waits if len(waits) > 1 else waits[0]  # only the last micro-batch of an update starts the reduction

    @property
    def module(self):
        """The last chunk, which on the last pipeline stage has the head."""
        return self.modules[-1]

    # ---- batches

    def layout(self, prompts_per_update: int) -> Layout:
        """How mini-batches of so many groups are laid out for this model on these ranks."""
        return micro_batches.layout(self.config, self.hf, self.topology, prompts_per_update)

    def receive(self, groups: list[Group], numbers: list[int], plan: Plan) -> list[list[Batch]]:
        """Exchange answers between ranks as the plan says; returns this rank's micro-batches of every mini-batch."""
        return self.pack(plan, exchange.exchange(groups, numbers, plan, self.topology))

    def pack(self, plan: Plan, answers: dict[int, TrainingAnswer], replica: int | None = None) -> list[list[Batch]]:
        """This rank's micro-batches of every mini-batch (or a replica's), from answers it holds by their number in the plan."""
        mine, multiple = self.topology.data_rank if replica is None else replica, plan.layout.sequence_multiple
        return [
            [_to_device(pack(members, answers, plan, mini.slots, multiple)) for members in mini.micro_batches[mine]]
            for mini in plan.mini_batches
        ]

    # ---- log-probs and updates

    def fill_old_logprobs(self, batches: list[Batch], settings: ObjectiveConfig) -> dict[str, float]:
        """Set old_logprobs of every micro-batch to this model's log-probs, and the correction of a sampler that differs from them (both
        on the last pipeline stage, where they are used). Returns the totals objectives.MEASURED over all ranks.
        """

        def collect(output, batch: Batch):
            sums = losses.fill_old_logprobs(self._hidden(output), self._head(), batch, _places(batch), settings)
            return torch.zeros((), device=output.device), torch.zeros((), dtype=torch.int), sums

        self._busy.begin()
        parts = self._joinable(batches)
        joined = [join(part) for part in parts]
        with torch.no_grad():  # a pipeline's stages agree on one length, which a rollout step need not have
            runs = [list(run) for _, run in groupby(joined, key=lambda b: len(b.tokens))]
            results = [result for run in runs for result in self._run(run, collect, forward_only=True)]
        for whole, part in zip(joined, parts, strict=True):
            split(whole, part)
        return self._totals(results, MEASURED)

    def _joinable(self, batches: list[Batch]) -> list[list[Batch]]:
        """Runs of micro-batches of one length, each as many as train.logprob_tokens_per_micro_batch has room for."""
        parts, tokens = [], self.config.train.logprob_tokens_per_micro_batch or 0
        for length, same in groupby(batches, key=lambda b: len(b.tokens)):
            run, count = list(same), max(tokens // length, 1)
            if len(run) % (count * self.topology.micro_batch_multiple) and self.topology.micro_batch_multiple > 1:
                count = 1  # an interleaved pipeline takes no remainder
            parts += [run[i : i + count] for i in range(0, len(run), count)]
        return parts

    def copy_old_logprobs(self, batches: list[Batch]) -> None:
        """Take the sampler's log-probs for pi_old (`old_logprobs: rollout`)."""
        for batch in batches:
            batch.old_logprobs = batch.sampler_logprobs

    def update(
        self, batches: list[Batch], objective: Objective, names: list[str], on_policy: bool = False, watch: Watch | None = None
    ) -> dict[str, float]:
        """One optimiser step on a mini-batch, given as this rank's micro-batches (equally many on every rank).

        names: the objective's metrics; their totals over all micro-batches and ranks are returned, with loss, grad_norm
        (before clipping) and lr. With fp16 also the loss_scale for the next update, and where the gradients overflowed there is no
        grad_norm and no step, as Megatron has it: parameters, moments and the schedule stay.
        on_policy: the weights are those that sampled (the first update of a rollout step). Then the totals MEASURED are returned, too, and
        with train.old_logprobs=recompute this pass's log-probs are pi_old's: exactly, without dropout.
        watch: notes how hard the update pushes the tokens of some answers.
        """
        own = on_policy and self.config.train.old_logprobs == "recompute"
        scale = float(self.optimizer.get_loss_scale()) if self.module.config.fp16 else 1.0

        def loss_of(output, batch: Batch):
            given = self._hidden(output), self._head(), batch, _places(batch), objective, self.config.objective
            loss, metrics = losses.loss(*given, measured=on_policy, own=own, scale=scale, watch=watch)
            return loss, torch.zeros((), dtype=torch.int), metrics

        self._busy.begin()
        self._come_back()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batches, loss_of, forward_only=False)
        self.scheduler.step(increment=1)  # before the update, so that the first one of a warm-up has a learning rate
        lr = self.optimizer.param_groups[0]["lr"]
        applied, grad_norm, _ = self.optimizer.step()
        if not applied:
            self.scheduler.step(increment=-1)
        totals = {**self._totals(results, ["loss", *names, *(MEASURED if on_policy else ())]), "lr": lr}
        if applied:
            totals["grad_norm"] = float(grad_norm)
        if self.module.config.fp16:
            totals["loss_scale"] = float(self.optimizer.get_loss_scale())
        return totals

    def _run(self, batches: list[Batch], on_output, forward_only: bool) -> list[dict]:
        """Megatron's pipeline schedule over the micro-batches; on_output(output, batch) on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if forward_only:
            self.gather_parameters()
        with deterministic.passes(self.config):
            return get_forward_backward_func()(
                forward_step_func=lambda iterator, chunk: self._forward(next(iterator), chunk, on_output),
                data_iterator=[iter(batches) for _ in self.chunks] if len(self.chunks) > 1 else iter(batches),
                model=list(self.chunks),
                num_microbatches=len(batches),
                seq_length=len(batches[0].tokens),
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def gather_parameters(self) -> None:
        """overlap_param_gather leaves the last update's parameters to the next update's forward pass; anyone else gathers them first."""
        if self._offload is None:
            return
        shared = self.config.megatron.ddp.get("reuse_grad_buf_for_mxfp8_param_ag")  # parameters arrive in the gradients' buffer
        self._offload.come_back(("gradients", "parameters") if shared else ("parameters",))
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _forward(self, batch: Batch, chunk, on_output):
        from megatron.core.packed_seq_params import PackedSeqParams

        watchdog.beat()
        places, longest = _places(batch), model.told_length(batch.max_seqlen, len(batch.tokens), self.module.config)
        packed = PackedSeqParams("thd", places.cu_seqlens, places.cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
        packed.places = places
        with self._busy.timed():
            output = chunk(batch.tokens[None, places.own], batch.positions[None, places.own], None, packed_seq_params=packed)
        return output, partial(self._timed, on_output, batch=batch)

    def _timed(self, on_output, output, batch: Batch):
        with self._busy.timed():
            return on_output(output, batch=batch)

    @property
    def own_seconds(self) -> float:
        """Of this rank's forward passes in the last fill_old_logprobs or update, head and loss included: what it waits for in the pipeline
        and in the reduction of gradients is left out, what tensor and context parallelism wait for within a layer is not."""
        return self._busy.seconds

    def _hidden(self, output: torch.Tensor) -> torch.Tensor:
        """The last stage's output [1, tokens (/cp /tp), hidden] as the head takes it: [tokens / cp, hidden], alike on every tensor rank."""
        from megatron.core import tensor_parallel

        if self.config.parallel.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(output[0])
        return tensor_parallel.copy_to_tensor_model_parallel_region(output[0])

    def _head(self) -> Head:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        return Head(model.head_weight(self.module), self.hf["vocab_size"], self.temperature, group)

    def _totals(self, results: list[dict[str, torch.Tensor]], names: list[str]) -> dict[str, float]:
        """Sums of the last stage's metrics over micro-batches and replicas, on every rank; maxima for names ending in _max."""
        mine = self.topology.speaks
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
        self._offload.leave(self._leaving)

    @property
    def _leaving(self) -> tuple[str, ...]:
        """train.offload; gradients, which are freed and not copied, cost nothing and leave a GPU by default."""
        return LEVELS[self.config.train.offload or ("gradients" if torch.cuda.is_available() else "none")]

    @property
    def returns_to_be_saved(self) -> bool:
        """Whether a checkpoint needs on the device what offload() moves off it: gradients are in none."""
        return set(self._leaving) > {"gradients"}

    def hand_over(self) -> Iterator[Bucket]:
        """weights() in buckets, for a sampler on the same device: all but the parameters leaves first. They leave by offload() when the
        sampler is done with the stream. It may keep tensors beyond the end, as vLLM does: a bucket's memory is then not used again."""
        if self._offload is not None:
            self._offload.leave(kind for kind in self._leaving if kind != "parameters")
        self.gather_parameters()
        return self._buckets(versions.values_of)

    def _come_back(self) -> None:
        if self._offload is not None:
            self._offload.come_back()

    # ---- weights

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under its Hugging Face name, full, on every rank; a collective: exhaust it on all ranks. The tensors are the
        caller's to keep, at the price of the whole bucket that each is a view of."""
        self.gather_parameters()
        return self.gathered(versions.values_of)

    def gathered(self, of: Callable[[torch.nn.Parameter], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """weights(), of another tensor of each parameter: what `of` returns, in the parameter's shape."""
        return chain.from_iterable(map(Bucket.tensors, self._buckets(of)))

    def _buckets(self, of: Callable[[torch.nn.Parameter], torch.Tensor]) -> Iterator[Bucket]:
        from megatron.core import parallel_state

        return stream(
            self.named_parameters(),
            self.table,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_expert_tensor_and_model_parallel_group() if self.table.sizes.experts else None,
            self.topology.expert_size,
            self.config.rollout.update_weights_bucket_megabytes * 2**20,
            of,
            self._buffers,
        )

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
    def _fill(self, source: HuggingFaceWeights | TorchDistWeights) -> None:
        for name, parameter in self._all_parameters():
            watchdog.beat()
            wanted = "embedding.word_embeddings.weight" if is_tied_copy(name, self.module) else name
            local = self.table.to_megatron(wanted, source.get, *self.topology.slice_of(expert_number(name) is not None))
            if local.shape != parameter.shape:
                raise UserError(
                    f"{name} is {tuple(local.shape)} in {source.directory}, the config asks for {tuple(parameter.shape)}",
                    "check config.json",
                )
            versions.set_values(parameter, local)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of this stage under their Megatron names, with global layer and expert numbers; a tied head is the embedding's."""
        return ((name, parameter) for name, parameter in self._all_parameters() if not is_tied_copy(name, self.module))

    def _all_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return numbered(self.modules, self.topology.expert_rank * self.table.sizes.experts // self.topology.expert_size)

    # ---- checkpoints

    def start_save(
        self, directory: Path, state: dict, then: Callable[[], None] = lambda: None, more: checkpoint.Files | None = None
    ) -> None:
        """Begin to write a complete checkpoint: model, optimizer, scheduler, RNG, and `state` (JSON) in the manifest. What training does
        from here on is not in it. finish_save() has to be called before the next one is started. `then` is called on the first rank when
        the checkpoint is complete, in the thread that writes. `more` is called on every rank in that thread: given the directory, it
        writes further files there and names them."""
        if self._offload is not None:
            self._offload.come_back(("optimizer",))
        self.gather_parameters()
        checkpoint.start(self._saver, directory, self, state, then, more)

    @property
    def saving(self) -> bool:
        """Whether a save was started that finish_save() has not ended."""
        return self._saver.under_way

    def finish_save(self, wait: bool) -> checkpoint.Saved | None:
        """How the save that was started ended; None where none was, and, unless it is waited for, while one goes on on any rank."""
        return self._saver.finish(wait)

    def save(self, directory: Path, state: dict) -> None:
        """Write a complete checkpoint, and wait for it. Raises UserError where the disk does not take it."""
        self.start_save(directory, state)
        saved = self.finish_save(wait=True)
        if saved.problem:
            raise checkpoint.failed(saved)

    def load(self, directory: Path) -> dict:
        """Fill model, optimizer, scheduler and RNG from a checkpoint; returns its `state`."""
        self._come_back()
        return checkpoint.load(directory, self)

    def load_newest(self, directory: Path) -> tuple[Path, dict]:
        """load() of a run's newest checkpoint, or of the newest before it that is not damaged; returns which, and its `state`."""
        self._come_back()
        return checkpoint.load_newest(directory, self)


def _sum_gradients(chunks, num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reduction without its division by a token count: the loss carries its own denominators."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(chunks, None, **kwargs)


def _places(batch: Batch) -> context.Places:
    """This rank's slots of a micro-batch, worked out once."""
    from megatron.core import parallel_state

    if not hasattr(batch, "places"):
        batch.places = context.Places(batch.cu_seqlens, parallel_state.get_context_parallel_group(), device())
    return batch.places


def _to_device(batch: Batch) -> Batch:
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved = {name: value.to(device()) for name, value in fields.items() if torch.is_tensor(value) and name != "cu_seqlens"}
    return Batch(**fields | moved)

"""This process's share of a vLLM engine, in the same process as the trainer.

Ranks 0 .. tp - 1 are engine 0, the next tp ranks engine 1, and so on. The engines run in lockstep: `generate`, `sync`, `sleep`,
`wake` and `gather` must be called by every rank, in the same order, and the ranks of one engine must be given the same requests.
`generate` raises Stopped, on all ranks, where the run is asked to stop; the engine is then as before the call.
"""

import gc
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist

from megatron_nft import watchdog
from megatron_nft.checksums import Checksum
from megatron_nft.config import RolloutConfig
from megatron_nft.config.engine import check_world
from megatron_nft.rollout import kv_scales, loaded
from megatron_nft.rollout.arguments import engine_arguments, has_draft_model, refusals_told
from megatron_nft.rollout.settings import (
    Request,
    generators_kept,
    leave_alone,
    mend_expansion,
    name_shared_memory,
    repack_experts,
    repack_head,
    rounds_head,
    sampling_params,
    set_environment,
    tame,
)
from megatron_nft.rollout.throughput import Throughput
from megatron_nft.stopping import Stopped
from megatron_nft.trajectories import Prompt, Response
from megatron_nft.weights import Bucket, is_checkpoint, load_weights, read_buckets
from megatron_nft.weights.layouts import expert_count

ASK_EVERY = 8  # scheduler steps: a fraction of a second, against a reduction over all ranks


class Engine:
    """A vLLM engine under the external launcher: torch.distributed and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_* are set by the caller.

    `index` of `count` engines is this rank's; `is_first` marks the one rank of an engine that hands on its answers; `slots` is how many
    answers an engine can have running; `weight_version` counts the syncs as told by the caller; `names` are the model's tensors under
    their Hugging Face names; `rounds_head` tells of a sampler that rounds its logits to 16 bits.
    """

    shows_tensors = True  # checksums() and differing() look at what vLLM holds

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        max_model_len: int,
        precision: str,
        seed: int,
        asked_to_stop: Callable[[], bool] | None = None,
        weights_follow: bool = False,
    ):
        """Start the engine with the weights of `model_path`, a Hugging Face directory or a checkpoint; weights_follow: sync() is called
        before anything else, so that those of a checkpoint need not be read.

        max_model_len is in tokens, prompt and answer together; precision is "fp32", "bf16" or "fp16"; the seed is the same on every rank.
        asked_to_stop gives all ranks the same answer, and is called by all of them equally often; where it is true, running answers are
        given up and Stopped is raised. Raises UserError where the world does not divide into engines, or vLLM refuses a setting.
        """
        world, rank, tp = dist.get_world_size(), dist.get_rank(), rollout.tensor_parallel_size
        check_world(rollout, world)
        self.count, self.index, self.is_first = world // tp, rank // tp, rank % tp == 0
        self.slots = rollout.max_num_seqs  # answers that can run at once
        self.weight_version = 0
        self._asked_to_stop = asked_to_stop
        self._on_gpu = torch.cuda.is_available()
        self._asleep = 0  # vLLM's sleep level
        self._group = dist.new_group(backend="gloo", timeout=watchdog.patience()) if world > 1 else None
        set_environment(rollout)
        from vllm import LLM

        if tp > 1 and not self._on_gpu:
            token = [uuid.uuid4().hex]
            dist.broadcast_object_list(token, group=self._group)
            name_shared_memory(token[0])
        if rollout.speculative_config and not self._on_gpu:
            mend_expansion()
        with generators_kept(), refusals_told():
            self._llm = LLM(
                **engine_arguments(rollout, model_path, max_model_len, precision, seed),
                distributed_executor_backend="external_launcher",
                data_parallel_size=self.count,
                enable_sleep_mode=self._on_gpu,
                disable_log_stats=False,
                use_tqdm_on_load=False,
            )
        self._engine = self._llm.llm_engine
        tame(self._engine)
        self.throughput = Throughput(self._engine)
        self._mixture = expert_count(self._llm.model_config.hf_config.to_dict()) > 0
        if not self._mixture:
            self._go_alone()
        self._has_draft = has_draft_model(rollout.speculative_config)
        self._scaled = rollout.calculate_kv_scales and rollout.kv_cache_dtype in kv_scales.DTYPES
        self._scales_from: list[list[int]] = []
        self._tied = self._llm.model_config.hf_config.tie_word_embeddings
        self.names = frozenset(load_weights(model_path).names())
        self.tokenizer = self._llm.get_tokenizer()
        self.rounds_head = any(self._llm.apply_model(rounds_head))
        if is_checkpoint(model_path) and not weights_follow:
            self.sync(read_buckets(load_weights(model_path)), version=0)

    def _go_alone(self) -> None:
        """Engines of a dense model have nothing to tell each other. vLLM itself takes them so where it starts them, and only couples those
        of an external launcher: by a reduction in each step, which one that has nothing to write would not join."""
        self._engine.vllm_config.parallel_config.data_parallel_size = 1
        self._llm.collective_rpc(leave_alone)

    def generate(self, requests: list[Request], on_finish: Callable[[int, Response], None] | None = None) -> list[Response]:
        """Sample one Response for each request, in the order of the requests.

        on_finish(index, response) is called the moment a response is done, while others still run.
        """
        responses: list[Response | None] = [None] * len(requests)
        for index, request in enumerate(requests):
            self.add(index, request)
        for steps in itertools.count():
            if steps % ASK_EVERY == 0 and self.asked_to_stop():
                self.withdraw(range(len(requests)))
                raise Stopped("stopped on request while answers were sampled")
            finished = self.step()
            if finished is None:
                return responses
            for index, response in finished:
                responses[index] = response
                if on_finish is not None:
                    on_finish(index, response)

    def add(self, key: int, request: Request) -> None:
        """Have an answer sampled; keys tell the running ones apart. All ranks of the engine add the same."""
        self._engine.add_request(str(key), {"type": "token", "prompt_token_ids": list(request.token_ids)}, sampling_params(request))

    @generators_kept()
    def step(self, alone: bool = False) -> list[tuple[int, Response]] | None:
        """One step of the scheduler, which samples a token of every running answer: those that it finishes, by key. None where nothing runs
        on any engine: a collective call, its condition being a reduction over them. alone: None where nothing runs on this one, without
        asking the others; all ranks call it equally often all the same, for the experts of a mixture may be spread over engines."""
        asks_itself = alone and not self._mixture
        if not (self._engine.output_processor if asks_itself else self._engine).has_unfinished_requests():
            return None
        finished = [output for output in self._engine.step() if output.finished]
        return [(int(output.request_id), self._response(output.outputs[0])) for output in finished]

    def withdraw(self, keys: Iterable[int]) -> dict[int, Response]:
        """Give up answers, on all ranks of the engine; what there is of each: finish_reason "unfinished", no tokens where it has not begun.
        Keys that do not run are passed over."""
        states = self._engine.output_processor.request_states
        mine = {int(state.external_req_id): state for state in states.values()}
        found = {key: self._so_far(mine[key]) for key in keys if key in mine}
        self._engine.abort_request([str(key) for key in found])
        return found

    @property
    def waiting(self) -> int:
        """Requests that wait for room in this engine."""
        return self._engine.engine_core.engine_core.scheduler.get_request_counts()[1]

    def decode(self, token_ids: list[int]) -> str:
        """As text, special tokens left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective call."""
        return self._asked_to_stop is not None and self._asked_to_stop()

    def token_logprobs(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-prob of every token given those before it, at temperature 1: one list for each sequence, shorter by one than the sequence.
        Neither a random generator nor the prefix cache remembers the call.

        A sequence is shorter than max_model_len: vLLM insists on room for a token more, and refuses the sequence where there is none.
        """
        from vllm import SamplingParams

        results: list[list[float] | None] = [None] * len(token_ids)

        def finish(index: int, output: Any) -> None:
            rows = zip(token_ids[index][1:], output.prompt_logprobs[1:], strict=True)
            results[index] = [row[token].logprob for token, row in rows]

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        for index, ids in enumerate(token_ids):
            self._engine.add_request(str(index), {"type": "token", "prompt_token_ids": list(ids)}, params)
        with generators_kept():
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    finish(int(output.request_id), output)
        self._reset_prefix_cache()
        return results

    def checksums(self) -> dict[frozenset[str], Checksum]:
        """Checksums of the weights that the engine holds as they are, by the Hugging Face tensors in them; see rollout/loaded.py."""
        return self._llm.apply_model(partial(loaded.checksums, names=sorted(self.names)))[0]

    def differing(self, weights: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
        """Which tensors of a stream this rank does not hold a part of as it should; the stream is taken to its end."""
        return self._llm.apply_model(lambda model: [name for name, full in weights if loaded.differs(model, name, full)])[0]

    def sync(self, buckets: Iterator[Bucket], version: int) -> None:
        """Load new weights: buckets of full tensors under their Hugging Face names, all of them. Wakes a sleeping engine.

        The buckets are taken one at a time, so a stream needs the memory of one; vLLM holds on to the tensors of a layer until it has them
        all, and to the last ones beyond the end. vLLM's own reload keeps repacked and quantised layers right. The prefix cache, filled by
        the old weights, is emptied. Raises RuntimeError for a stream that leaves tensors out (vLLM itself would keep the old ones).
        """
        with self.throughput.timed("sync"):
            self._reload(buckets)
            self._measure_scales()
        self.weight_version = version

    def _reload(self, buckets: Iterator[Bucket]) -> None:
        missing = set(self.names)

        def counted(named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
            missing.discard(named[0])
            watchdog.beat()
            return named

        weights = map(counted, chain.from_iterable(map(methodcaller("tensors"), buckets)))  # keeps no bucket while the next one is made
        if self._asleep:
            with self.throughput.timed("wake"):
                self._engine.wake_up(["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are missing from the weight stream, e.g. {min(missing)}")
        if not self._on_gpu:
            self._llm.apply_model(repack_experts)
        if self._tied and not self._on_gpu:
            self._llm.apply_model(repack_head)
        if self._asleep:
            with self.throughput.timed("wake"):
                self._engine.wake_up(["kv_cache"])  # only now: the stream's own buffers are free again
        self._reset_prefix_cache()
        self._asleep = 0

    def scale_cache_by(self, prompts: list[Prompt]) -> None:
        """Take an FP8 cache's scales from the keys and values of the first of these prompts: now, and after each sync. Nothing where the
        cache has no scales. Every rank gives the same prompts, each shorter than max_model_len."""
        self._scales_from = [list(prompt.token_ids) for prompt in prompts[: kv_scales.SEQUENCES]]
        if not self._asleep:
            self._measure_scales()

    def _measure_scales(self) -> None:
        if not (self._scaled and self._scales_from):
            return
        full_graphs = self._engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        [measuring] = self._llm.apply_model(partial(kv_scales.Measuring, full_graphs=full_graphs))
        self.token_logprobs(self._scales_from)
        measuring.finish()

    def sleep(self, level: int = 2) -> None:
        """Give the GPU's memory back between phases: level 2 drops the weights (only sync wakes it), level 1 keeps them on the host. A
        model that drafts, which no sync fills, is kept: level 1 for both."""
        if self._on_gpu and not self._asleep:
            level = 1 if self._has_draft else level
            with self.throughput.timed("sleep"):
                self._engine.sleep(level)
            self._asleep = level

    def wake(self) -> None:
        """Undo sleep(level=1)."""
        if self._asleep == 2:
            raise RuntimeError("an engine asleep at level 2 has no weights: wake it with sync()")
        if self._asleep:
            with self.throughput.timed("wake"):
                self._engine.wake_up()
            self._asleep = 0

    def added(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a tensor on the CPU, in its place. A collective call."""
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all engines, in their order, on every rank; of an engine's ranks the first one's counts. Any picklable value."""
        if self._group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values[:: len(values) // self.count]

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: answers were still running")

    def close(self) -> None:
        """Free the engine's memory and its groups. torch.distributed stays as it is: it belongs to the caller."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        self._engine.model_executor.shutdown()  # the engine core's own shutdown would end torch.distributed, too
        del self._engine, self._llm
        destroy_model_parallel()
        gc.unfreeze()  # vLLM freezes what it allocates at start
        gc.collect()

    def _response(self, output: Any) -> Response:
        """vLLM's output as a Response. Token ids and log-probs are untouched; the text leaves special tokens out."""
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended an answer with {output.finish_reason!r}")
        token_ids = list(output.token_ids)
        logprobs = list(output.logprobs.logprobs)
        return Response(token_ids, logprobs, output.finish_reason, self.weight_version, self.decode(token_ids))

    def _so_far(self, state: Any) -> Response:
        """What vLLM's output processor has of a running request."""
        token_ids, logprobs = list(state.detokenizer.output_token_ids), state.logprobs_processor.logprobs
        return Response(token_ids, list(logprobs.logprobs)[: len(token_ids)], "unfinished", self.weight_version, "")

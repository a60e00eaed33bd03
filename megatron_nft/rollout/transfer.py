"""How weights get from the trainer into a vLLM server: over vLLM's own weight-transfer interface, one process group for each server.

On GPUs the server's side is vLLM's own `nccl` back end; on the CPU it is the one here, over gloo, which vLLM finds under GLOO. Both take
one `update_weights` call for each bucket, with the names, dtypes and shapes of its tensors, and receive these one after another from rank 0
of the group, the trainer. A group for each server: one that dies or hangs takes no other with it. This module imports vLLM.
"""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_nft.rollout.settings import repack_experts, repack_head, rounds_head
from megatron_nft.rollout.wire import GLOO

INSTANCE = uuid.uuid4().hex  # of this process: a server that was started anew has another
ASK_EVERY = 0.005  # seconds between two looks at a transfer over NCCL
OF_MODEL = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "tie_word_embeddings")  # fields of config.json by which two models are told apart  # fmt: skip


def register() -> None:
    """Tell vLLM of the back end, in this process. The entry point of the group vllm.general_plugins; may be called again."""
    if GLOO not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(GLOO, GlooTransferEngine)


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group of a server meets: fields as in vLLM's NCCL back end."""

    master_address: str
    master_port: int
    rank_offset: int  # of the server's first worker: 1, after the trainer
    world_size: int
    timeout: float = 300.0  # seconds for one tensor


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """The tensors of one bucket, in the order in which they are sent: fields as in vLLM's NCCL back end."""

    names: list[str]  # Hugging Face's
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooTransferEngine(WeightTransferEngine[GlooInitInfo, BucketInfo]):
    """The server's side on the CPU, beside the model in each of the server's workers."""

    init_info_cls, update_info_cls = GlooInitInfo, BucketInfo
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group; leaves the one before, if there was one."""
        self.shutdown()
        workers = self.parallel_config.world_size  # of a data-parallel replica
        rank = init_info.rank_offset + self.parallel_config.data_parallel_index * workers + self.parallel_config.rank
        self._group = _gloo_group(init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket. vLLM's own method waits for an accelerator, and there is none."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketInfo) -> None:
        if self._group is None:
            raise RuntimeError("the weight transfer has no process group: init_weight_transfer_engine comes first")
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self._group, tensor)
            self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        """What vLLM does at the end of a reload, and what it forgets on the CPU."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_experts(self.model)
        if self.model_config.hf_config.tie_word_embeddings:
            repack_head(self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None


class Extension:
    """Methods of a server's workers that are called over /collective_rpc. vLLM imports this class by its dotted path in each worker, which
    tells it of the back end where the package is not installed and has no entry points."""

    def megatron_nft_describe(self) -> dict[str, Any]:
        """What a client has to know of the server: plain values."""
        config, vllm_config = self.model_config.hf_config, self.vllm_config
        transfer = vllm_config.weight_transfer_config
        return {
            "instance": INSTANCE,
            "model": {key: getattr(config, key) for key in OF_MODEL if hasattr(config, key)},
            "max_model_len": self.model_config.max_model_len,
            "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
            "logprobs_mode": str(getattr(self.model_config.logprobs_mode, "value", self.model_config.logprobs_mode)),
            "backend": transfer.backend if transfer else None,
            "workers": vllm_config.parallel_config.world_size * vllm_config.parallel_config.data_parallel_size,
            "rounds_head": rounds_head(self.get_model()),
        }


register()


class GlooLink:
    """The trainer's end of a server's group, on the CPU."""

    def __init__(self, address: str, port: int, workers: int, timeout: float):
        """Waits until all `workers` of the server have joined, at most `timeout` seconds; raises RuntimeError where they have not."""
        self._group = _gloo_group(address, port, 0, 1 + workers, timeout)

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Raises RuntimeError where the server is gone, or takes no tensor in time."""
        for tensor in tensors:
            _broadcast(self._group, tensor.contiguous())

    def close(self) -> None:
        self._group.shutdown()


class NcclLink:
    """The trainer's end of a server's group, on a GPU: vLLM's communicator, as its own trainer side makes it."""

    def __init__(self, address: str, port: int, workers: int, timeout: float):
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self._timeout, self._device = timeout, torch.cuda.current_device()
        group = StatelessProcessGroup.create(host=address, port=port, rank=0, world_size=1 + workers, store_timeout=int(timeout))
        self._communicator = PyNcclCommunicator(group, device=self._device)
        self._stream = torch.cuda.Stream(self._device)

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Raises RuntimeError where the server takes no tensor in time: NCCL itself would wait for ever."""
        torch.cuda.set_device(self._device)
        self._stream.wait_stream(torch.cuda.default_stream(self._device))  # where the tensors were gathered
        for tensor in tensors:
            self._communicator.broadcast(tensor.contiguous(), src=0, stream=self._stream)
        sent = self._stream.record_event()
        end = time.monotonic() + self._timeout
        while not sent.query():
            if time.monotonic() > end:
                raise RuntimeError(f"the server took no weights for {self._timeout:.0f} s")
            time.sleep(ASK_EVERY)

    def close(self) -> None:
        self._communicator.destroy()


def link(address: str, port: int, workers: int, timeout: float) -> GlooLink | NcclLink:
    """The trainer's end of the group of a server with so many workers, which is being told of the same address and port."""
    return (NcclLink if torch.cuda.is_available() else GlooLink)(address, port, workers, timeout)


def _gloo_group(address: str, port: int, rank: int, size: int, timeout: float) -> ProcessGroupGloo:
    """A group that torch.distributed's own functions know nothing of. Its store is made here: torch's rendezvous would ask torchrun's."""
    limit = timedelta(seconds=timeout)
    store = TCPStore(address, port, size, is_master=rank == 0, timeout=limit)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, size, limit)


def _broadcast(group: ProcessGroupGloo, tensor: Tensor) -> None:
    """From rank 0."""
    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()

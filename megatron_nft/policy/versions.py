"""What differs between Megatron-Core 0.16 and 0.19, between builds of Transformer Engine and Apex, and between PyTorch 2.10 and 2.13."""

import importlib
import importlib.util
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from megatron_nft.errors import UserError, first_line
from megatron_nft.policy.adam import Adam

# Notices of Megatron-Core about its own inside, which the user can do nothing about: by logger, and as warnings.
_NOTICES = {
    "rerun_state_machine": "",
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "dist_checkpointing.serialization": "Overwriting old incomplete",
}
_WARNINGS = (
    "`torch.distributed",  # a name that torch calls deprecated
    "The .grad attribute of a Tensor that is not a leaf",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "(Transformer Engine and )?Apex (is|are) not installed",
    "absl.logging is not installed",
    r"\w+ is experimental and still under active development",
    "If you are using transformer_engine as the transformer implementation",  # said of every recomputed attention
)
_quieted: list[str] = []
PICKLED_EXTRA_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"  # Transformer Engine's


def quiet() -> None:
    """Keep Megatron-Core's notices from the terminal. Called before it is imported; a second call only renews the warnings' filters."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, start in _NOTICES.items():
        if name not in _quieted:
            logging.getLogger(f"megatron.core.{name}").addFilter(
                lambda r, start=start: r.levelno > logging.WARNING or start not in r.getMessage()
            )
            _quieted.append(name)


# what an installation that does not fit raises: a name or library that is missing, versions of its parts that differ
_NOT_LOADED = (ImportError, OSError, RuntimeError, AssertionError, AttributeError)
_ENGINE = "transformer_engine"


@cache
def _engine_error() -> Exception | None:
    """Why Transformer Engine, which is installed, does not load; None where it does, and where it is not installed."""
    if importlib.util.find_spec(_ENGINE) is None:
        return None
    try:
        importlib.import_module(f"{_ENGINE}.pytorch")
    except _NOT_LOADED as error:
        return error
    return None


def prepare() -> None:
    """What has to be done before Megatron-Core is imported: its notices, and, without a GPU, a Transformer Engine that does not load, for
    want of the driver's library, say: Megatron takes an ImportError alone for one that is not there, and nothing here would use it."""
    quiet()
    if not torch.cuda.is_available() and sys.modules.get(_ENGINE) is None and _engine_error() is not None:
        sys.modules[_ENGINE] = None  # its import raises ModuleNotFoundError from now on


def check_transformer_engine() -> None:
    """Raise UserError where there is a GPU and Transformer Engine is installed, but does not load, or Megatron-Core does not take it: the
    run would go without it, and slowly. Without Transformer Engine installed it goes by local layers."""
    if not torch.cuda.is_available() or importlib.util.find_spec(_ENGINE) is None:
        return
    mend = "mend the installation (its parts are of one version, built for this torch and CUDA), or uninstall it to go by local layers"
    if error := _engine_error():
        raise UserError(f"Transformer Engine{_installed('transformer-engine')} is installed and does not load ({first_line(error)})", mend)
    from megatron.core.models.gpt import gpt_layer_specs

    if not gpt_layer_specs.HAVE_TE:
        raise UserError(
            f"Megatron-Core {version()} does not take Transformer Engine{_installed('transformer-engine')} ({_why_not_taken()})", mend
        )


def _installed(distribution: str) -> str:
    """ " 2.20.2", or nothing where it is not known."""
    try:
        return f" {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return ""


def _why_not_taken() -> str:
    """What Megatron-Core's layers miss in Transformer Engine: it says nothing of it itself."""
    try:
        importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    except _NOT_LOADED as error:
        return first_line(error)
    return "a name that it looks for is missing"


def fp8_refused(recipe: str) -> str:
    """Why Transformer Engine cannot compute an FP8 recipe here, in its own words; "" where it can, or does not say."""
    if importlib.util.find_spec(_ENGINE) is None:
        return ""
    places = (f"{_ENGINE}.pytorch.quantization", f"{_ENGINE}.pytorch.fp8")  # the first since 2.8
    own = importlib.import_module(next(place for place in places if importlib.util.find_spec(place)))
    name = {"mxfp8": "check_mxfp8_support", "blockwise": "check_fp8_block_scaling_support"}.get(recipe, "check_fp8_support")
    asked = getattr(own, name, None)
    return "" if asked is None else asked()[1]


def check_fp8_recipe(transformer) -> None:
    """Let Megatron-Core make the recipe of a TransformerConfig: raises ValueError or AssertionError for one that it cannot make with this
    Transformer Engine."""
    if not transformer.fp8:
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    if transformer.fp8_recipe == "delayed":
        mend_delayed_scaling()
    get_fp8_recipe(transformer)


def version() -> str:
    """Megatron-Core's version as imported (a copy on PYTHONPATH hides the installed one)."""
    import megatron.core

    return megatron.core.__version__.partition("+")[0]  # without the commit it was built from


def have_transformer_engine() -> bool:
    """Whether Megatron-Core found Transformer Engine, and a GPU to run it."""
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.HAVE_TE and torch.cuda.is_available()


def have_fused_accumulation(by_transformer_engine: bool) -> bool:
    """Whether a kernel is there that adds a weight's gradient onto the float32 buffer: Apex's for local layers, TE's own for its."""
    return by_transformer_engine or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@contextmanager
def fused_accumulation_in_layers(by_transformer_engine: bool) -> Iterator[None]:
    """While a model is made: where the layers are Transformer Engine's, let it have gradient_accumulation_fusion without Apex.

    Megatron-Core (0.16 to 0.19) asks for Apex's kernel in its output layer, whose own passes would use it: here they are logprobs.py's.
    """
    from megatron.core.tensor_parallel import layers

    there = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = there or by_transformer_engine
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = there


def fp8_side(recipe: str) -> int:
    """What the sides of an FP8 multiplication must divide by."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    return get_fp8_align_size(Fp8Recipe[recipe])


def mend_delayed_scaling() -> None:
    """Let Transformer Engine's delayed recipe be made by Megatron-Core (0.16 to 0.19), which tells it of products to keep out of FP8: later
    versions of it (2.20 is one) do not take that argument. It is dropped where it names none of them.

    Raises UserError, where the recipe is made, for megatron.transformer.fp8_wgrad=false, which such a version cannot do.
    """
    from transformer_engine.common.recipe import DelayedScaling

    make, name = DelayedScaling.__init__, "override_linear_precision"
    if name in inspect.signature(make).parameters:
        return

    def init(self, *arguments, override_linear_precision: tuple = (), **more) -> None:
        if any(override_linear_precision):
            raise UserError(
                "megatron.transformer.fp8_wgrad is false, and this Transformer Engine's delayed recipe has all products in FP8",
                "leave it out, or choose another model.fp8_recipe",
            )
        make(self, *arguments, **more)

    DelayedScaling.__init__ = init


def mend_router() -> None:
    """Let a mixture's router do without a matrix product of Transformer Engine's: Megatron-Core 0.16.1 asks whether it is None, having
    defined it only where it is not."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def have_varlen_attention() -> bool:
    """Whether this PyTorch has torch.nn.attention.varlen (2.10 and later) and there is a GPU to run it."""
    return torch.cuda.is_available() and importlib.util.find_spec("torch.nn.attention.varlen") is not None


def causal_varlen_attention(scale: float | None = None, function: Callable | None = None) -> Callable:
    """attend(query [tokens, heads, d], key and value [tokens, kv heads, d], cu_seqlens [sequences + 1], longest) -> [tokens, heads, d].

    torch's varlen_attn (or `function`) has said "causal" by `is_causal` and by a window, and knows grouped queries in later versions
    only; in earlier ones each key head is repeated for its queries.
    """
    if function is None:
        from torch.nn.attention.varlen import varlen_attn as function
    known = inspect.signature(function).parameters
    more = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known
    if scale is not None:
        more["scale"] = scale

    def attend(query, key, value, cu_seqlens, longest):
        repeats, settings = query.shape[1] // key.shape[1], dict(more)
        if grouped:
            settings["enable_gqa"] = repeats > 1
        elif repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        return function(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **settings)

    return attend


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in place: float32 of 16-bit operands on CUDA, never rounded to 16 bits. From PyTorch 2.11 on in the product itself;
    earlier ones take no float32 summand, and make the product apart."""
    if _release() >= (2, 11):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


def _release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def values_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's data as a plain tensor: one kept in FP8 (model.fp8_param_gather) becomes bf16."""
    return plain(parameter).data


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor kept in FP8 in the dtype it is said to have; any other as it is."""
    from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


@torch.no_grad()
def set_values(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Fill a parameter. One kept in FP8 also has the values that the optimizer's float32 copy starts from, unrounded."""
    parameter.copy_(values)
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter.get_high_precision_init_val().copy_(values)


def save_strategy(write: Callable[[dict, str], None]):
    """A strategy for dist_checkpointing.save: write(sharded state, directory) writes the sharded tensors and objects.

    0.19 makes the state that all ranks share one of the objects; it gets its file of 0.16, too, which 0.16 cannot load without and 0.19
    prefers.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class Strategy(TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict, checkpoint_dir, *unused) -> None:
            for value in nested_values(sharded_state_dict):
                if isinstance(value, ShardedObject) and value.key == "common_state":
                    torch.save(value.data, Path(checkpoint_dir) / "common.pt")
            write(sharded_state_dict, checkpoint_dir)

    return Strategy("torch_dist", 1)


def fused_adam() -> str | None:
    """Where the FusedAdam that Megatron-Core found comes from: "Transformer Engine", "Apex", or None (it would take torch's)."""
    from megatron.core import optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER or optimizer.Adam is Adam:
        return None
    return "Transformer Engine" if optimizer.Adam.__module__.startswith("transformer_engine") else "Apex"


def provide_adam() -> None:
    """Give Megatron-Core's optimizer an Adam whose step lives in the param group, where no FusedAdam is installed or can run.

    With torch's own its checkpoints do not load: it looks for the step there.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if torch.cuda.is_available() and fused_adam():
        _complete(optimizer.Adam)
        return
    optimizer.Adam = distrib_optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True


def _complete(adam: type) -> None:
    """Where optimizer.use_precision_aware_optimizer makes moments Megatron-Core names the parameter alone; Transformer Engine's FusedAdam
    wants to be told, too, whether its float32 copy is to be bf16 and a remainder, which it knows itself."""
    make = getattr(adam, "initialize_state", None)
    told = inspect.signature(make).parameters.get("store_param_remainders") if make else None
    if told is None or told.default is not inspect.Parameter.empty:
        return

    def initialize_state(self, param, store_param_remainders: bool | None = None):
        own = self.store_param_remainders and param.dtype == torch.bfloat16
        return make(self, param, own if store_param_remainders is None else store_param_remainders)

    adam.initialize_state = initialize_state


@contextmanager
def extra_states_taken() -> Iterator[None]:
    """Within it Transformer Engine's layers take the scales of the recipe `delayed` back, which it pickles. Only for files whose checksums
    were compared; Megatron-Core and torch unpickle parts of the same checkpoint."""
    before = os.environ.get(PICKLED_EXTRA_STATE)
    os.environ[PICKLED_EXTRA_STATE] = "1"
    try:
        yield
    finally:
        os.environ.pop(PICKLED_EXTRA_STATE) if before is None else os.environ.update({PICKLED_EXTRA_STATE: before})


def split_state(state: dict, validate: bool) -> tuple[dict, dict | None]:
    """(what ranks share, what all have in common) of a sharded state, as dist_checkpointing.save() splits it.

    Up to 0.16 the common part is a file of its own, common.pt; later it is one of the shared objects, and None here. validate: compare
    between all ranks that every part of every tensor is saved once.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    sharded, common = save_preprocess(state, validate)
    if "async_strategy" not in inspect.signature(dist_checkpointing.save).parameters:
        return sharded, common
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=torch.distributed.get_rank())
    return sharded, None

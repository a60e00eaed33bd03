"""A Megatron-Core GPTModel from a Hugging Face config.json."""

from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_nft.config import Config, ParallelConfig, max_answer_length
from megatron_nft.errors import UserError
from megatron_nft.policy import machine, manifest, settings, topology, versions
from megatron_nft.policy.layers import PackedAttention, RMSNorm
from megatron_nft.policy.varlen import VarlenAttention
from megatron_nft.sizes import check_layout, check_ranks, expert_tensor_size, virtual_size
from megatron_nft.weights import check_tokenizer, is_checkpoint, load_weights, padded_vocab_size, table_for


def check(config: Config, window: int) -> None:
    """Raise UserError for a model that cannot be laid out, is not all there, or that this code would compute wrongly.

    Nothing is allocated. window: tokens of the longest prompt with its answer.
    """
    if is_checkpoint(config.model.path):
        manifest.check_weights(Path(config.model.path))
    hf = load_weights(config.model.path).config
    check_tokenizer(Path(config.model.path), hf["vocab_size"])
    for key in ("rms_norm_eps", "max_position_embeddings"):
        if hf.get(key) is None:
            raise UserError(f"config.json in {config.model.path} has no {key}", "take the model's complete config.json")
        if not isinstance(hf[key], int | float):
            raise UserError(f"{key} in {config.model.path} is {hf[key]!r}, no number", "take the model's own config.json")
    check_layout(hf, config)
    _check_kind(hf)
    check_ranks(config.parallel, topology.world_size())
    if window > hf["max_position_embeddings"]:
        answers = "rollout.max_tokens" if config.rollout.max_tokens == max_answer_length(config) else "evaluation.max_tokens"
        raise UserError(
            f"data.max_prompt_length ({config.data.max_prompt_length}) and {answers} ({max_answer_length(config)}) are together more than "
            f"the model's window ({hf['max_position_embeddings']} tokens, max_position_embeddings)",
            "lower one of them",
        )
    rope_settings(hf)


def _check_kind(hf: dict) -> None:
    """Raise UserError for what the supported families' configs allow and no layer here computes."""
    if hf.get("use_sliding_window"):
        raise UserError("the model uses sliding-window attention", "choose a model with full attention, or set use_sliding_window to false")
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        raise UserError("the model has biases on its output or MLP projections", "choose a model without them")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"the model's activation is {hf['hidden_act']}", "choose a model with silu")


def transformer_config(hf: dict, config: Config):
    """Megatron's TransformerConfig for the config.json of a supported family."""
    from megatron.core.transformer import TransformerConfig

    table, gpu = table_for(hf), torch.cuda.is_available()
    chunks = virtual_size(config.parallel)
    own = dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=table.qkv_bias,
        qk_layernorm=table.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=config.parallel.context_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
        calculate_per_token_loss=True,  # gradients are summed over ranks; batching put the denominators into the loss
        perform_initialization=False,  # every weight is loaded
        use_cpu_initialization=not gpu,
        **settings.transformer(config),
        **_experts(hf, config.parallel),
    )
    defaults = dict(
        bias_activation_fusion=gpu,
        masked_softmax_fusion=gpu,
        bias_dropout_fusion=gpu,
        apply_rope_fusion=gpu and by_transformer_engine(settings.dtype_of(config.model.precision)),
        # interleaved over two stages, a rank is its neighbour's neighbour on both sides: in one batch the messages would be mixed up
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
    )
    if table.sizes.experts:
        grouped = by_transformer_engine(settings.dtype_of(config.model.precision))
        defaults |= dict(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_token_dispatcher_type="alltoall",
                         moe_grouped_gemm=grouped)  # fmt: skip
    return settings.complete("transformer", TransformerConfig, own, config, defaults)


def _experts(hf: dict, parallel: ParallelConfig) -> dict:
    """TransformerConfig's fields for a mixture of experts; none for a dense model."""
    table = table_for(hf)
    if not table.sizes.experts:
        return {}
    return dict(
        num_moe_experts=table.sizes.experts,
        moe_layer_freq=[int(table.has_experts(layer)) for layer in range(table.sizes.layers)],
        moe_ffn_hidden_size=table.sizes.expert_ffn,
        moe_router_topk=hf["num_experts_per_tok"],
        # a softmax over the chosen experts is what norm_topk_prob makes of one over all of them
        moe_router_pre_softmax=not hf.get("norm_topk_prob", False),
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(parallel),
    )


def told_length(longest: int, tokens: int, transformer) -> int:
    """The longest sequence of a micro-batch of `tokens`, as its attention is told: rounded up for Transformer Engine, which builds a cuDNN
    graph for every number that it has not seen (and itself rounds to 64), to one of at most eight numbers between a power of two and
    the next. Megatron's own rotary embedding is as long as it is told, so it is told exactly."""
    if not transformer.apply_rope_fusion:
        return longest
    step = max(64, 2 ** (longest.bit_length() - 4))
    return min(-(-longest // step) * step, tokens)


def by_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether the layers are Transformer Engine's: where it is, and in 16 bits (its attention over packed sequences knows no float32)."""
    return dtype in (torch.bfloat16, torch.float16) and versions.have_transformer_engine()


def block_spec(megatron, vp_stage: int | None = None):
    """Layer spec of this pipeline stage (of its chunk vp_stage): Transformer Engine's where it is installed, otherwise Megatron's local
    one with our RMSNorm and packed attention in place of its own (its norm refuses sequence parallelism, its attention packed input)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(
        megatron,
        use_transformer_engine=by_transformer_engine(megatron.params_dtype),
        normalization="RMSNorm",
        vp_stage=vp_stage,
    )
    if not by_transformer_engine(megatron.params_dtype):
        spec.layer_norm = RMSNorm
        for layer in spec.layer_specs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = attention_module(megatron.params_dtype, megatron.context_parallel_size)
            if megatron.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def attention_module(dtype: torch.dtype, context_parallel_size: int) -> type:
    """torch's varlen attention where it can run (16 bits, CUDA, no context parallelism), else our own."""
    short = dtype in (torch.bfloat16, torch.float16)
    return VarlenAttention if short and context_parallel_size == 1 and versions.have_varlen_attention() else PackedAttention


def kernels(config: Config) -> str:
    """One line on the kernels in use: layers, attention, norms, precision, optimizer."""
    dtype, cp = settings.dtype_of(config.model.precision), config.parallel.context_parallel_size
    where = machine.device_name()
    if by_transformer_engine(dtype):
        layers = "Transformer Engine layers, norms and attention (FlashAttention or cuDNN, as it finds)"
    else:
        attention = "torch varlen_attn" if attention_module(dtype, cp) is VarlenAttention else "torch scaled_dot_product_attention"
        layers = f"local layers, {attention} over packed sequences"
    precision = settings.precision_of(config.model.precision)
    if config.model.fp8:
        precision += f" and FP8 ({config.model.fp8}, {config.model.fp8_recipe})"
    fused = versions.fused_adam() if torch.cuda.is_available() else None
    adam = f"{fused}'s FusedAdam" if fused else "torch AdamW"
    return f"Megatron-Core {versions.version()} on {where}: {layers}, {precision}, {adam}"


def build(hf: dict, config: Config) -> list:
    """This rank's GPTModels, weights not yet loaded: one, or its chunks of an interleaved pipeline. They share one TransformerConfig.

    The output of the last is the last hidden state [1, tokens (/cp /tp), hidden], not logits.
    """
    megatron, chunks = transformer_config(hf, config), virtual_size(config.parallel)
    if config.model.fp8 and config.model.fp8_recipe == "delayed":
        versions.mend_delayed_scaling()
    return [_chunk(hf, config, megatron, vp_stage) for vp_stage in ([None] if chunks is None else range(chunks))]


def _chunk(hf: dict, config: Config, megatron, vp_stage: int | None):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    versions.mend_router()
    post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    with versions.fused_accumulation_in_layers(by_transformer_engine(megatron.params_dtype)):
        model = GPTModel(
            config=megatron,
            transformer_layer_spec=block_spec(megatron, vp_stage),
            vocab_size=padded_vocab_size(hf["vocab_size"], config.parallel.tensor_model_parallel_size),
            max_sequence_length=hf["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=post_process,
            share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings")),
            position_embedding_type="rope",
            vp_stage=vp_stage,
            **rope_settings(hf),
        )
    _mark_tensor_parallel(model)
    if post_process:
        # logprobs.py multiplies by the head's weight itself, in chunks, so that logits [tokens, vocab] never exist
        model.output_layer.forward = lambda hidden, weight=None, runtime_gather_output=None: (hidden, None)
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model


def _mark_tensor_parallel(model) -> None:
    """Mark the weights that are cut over tensor-parallel ranks, as Megatron does while it initialises them, which is left out here.

    Without the mark only the first rank's part counts in the gradient norm.
    """
    from megatron.core import tensor_parallel as tp

    cut_along = {tp.ColumnParallelLinear: 0, tp.RowParallelLinear: 1, tp.VocabParallelEmbedding: 0}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in cut_along and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tp.set_tensor_model_parallel_attributes(weight, True, cut_along[type(module)], 1)


def head_weight(model) -> torch.Tensor:
    """[padded vocab / tp, hidden] of the last stage, shared with the embedding where the model ties them."""
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


def rope_settings(hf: dict) -> dict:
    """GPTModel's rope arguments, from transformers 4's (rope_theta, rope_scaling) or 5's (rope_parameters) spelling."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"the model's rope settings in config.json are {rope!r}, no object", "take the model's own config.json")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    settings = {"rotary_base": theta, "rotary_percent": 1.0}
    if kind == "default":
        return settings
    # Megatron-Core knows Llama 3's scaling with these constants
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope.get(key) == value for key, value in constants.items()):
        return {**settings, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise UserError(f"the model's rope scaling is {kind!r}, which is not supported", "choose a model with plain or Llama 3 rope")

"""Settings under vLLM's names that contradict each other, or that are not the user's to make. What depends on the machine or on vLLM's
version is refused by rollout.check."""

from megatron_nft.config.settings import Config, RolloutConfig
from megatron_nft.errors import UserError

# fields of vLLM's EngineArgs that have a setting of their own, and what rollout.vllm must leave to it
SETTINGS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.precision",
    "seed": "seed",
    "max_model_len": "data.max_prompt_length and rollout.max_tokens",
    **{
        name: f"rollout.{name}"
        for name in (
            "tensor_parallel_size",
            "gpu_memory_utilization",
            "max_num_seqs",
            "max_num_batched_tokens",
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "enforce_eager",
            "quantization",
            "kv_cache_dtype",
            "calculate_kv_scales",
            "speculative_config",
        )
    },
}
# what the program rests on: the layout, the log-probs that training takes, where weights come from, what is measured
OWNED = {
    *("distributed_executor_backend", "data_parallel_size", "pipeline_parallel_size", "enable_sleep_mode", "load_format"),
    *("logprobs_mode", "max_logprobs", "hf_overrides", "disable_log_stats", "skip_tokenizer_init", "weight_transfer_config"),
    *("worker_cls", "worker_extension_cls", "generation_config", "override_generation_config", "runner", "convert", "enable_lora"),
    *("spec_method", "spec_model", "spec_tokens", "use_tqdm_on_load"),
}


def check(config: Config) -> None:
    """Raise UserError for settings that do not go together."""
    rollout = config.rollout
    _check_answers(rollout)
    for name in rollout.vllm:
        if name in SETTINGS:
            raise UserError(f"rollout.vllm.{name} has a setting of its own", f"set {SETTINGS[name]}")
        if name in OWNED:
            raise UserError(f"rollout.vllm.{name} is not to be set: the program depends on it", "leave it out")
    if rollout.cudagraph_mode is not None and "compilation_config" in rollout.vllm:
        raise UserError("rollout.cudagraph_mode is set, and rollout.vllm.compilation_config, too", "put the mode into the latter")
    if rollout.enforce_eager and rollout.cudagraph_mode not in (None, "NONE"):
        raise UserError(
            f"rollout.enforce_eager is true and rollout.cudagraph_mode {rollout.cudagraph_mode}",
            "leave one out: eager has no graphs",
        )
    _check_speculation(rollout)


def _check_answers(rollout: RolloutConfig) -> None:
    for text in rollout.stop:
        if not isinstance(text, str):
            raise UserError(f"rollout.stop holds {text!r}, which is no string", "put it in quotes, e.g. rollout.stop=['\\n\\n']")
        if not text:
            raise UserError("rollout.stop holds an empty string, which would end every answer at once", "leave it out")
    if rollout.max_num_seqs < rollout.n:
        raise UserError(
            f"rollout.max_num_seqs ({rollout.max_num_seqs}) is less than rollout.n ({rollout.n}), whose answers to a prompt start together",
            "raise it, or lower n",
        )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        raise UserError(
            f"rollout.max_num_batched_tokens ({rollout.max_num_batched_tokens}) is less than rollout.max_num_seqs "
            f"({rollout.max_num_seqs}), each of which gets a token in a scheduler step",
            "raise it, or lower max_num_seqs",
        )


def _check_speculation(rollout: RolloutConfig) -> None:
    speculative = rollout.speculative_config
    if not speculative:
        return
    if rollout.stop:
        raise UserError(
            "rollout.stop and rollout.speculative_config are set: vLLM looks for stop strings once a step, after several tokens",
            "leave one of them out",
        )
    if "num_speculative_tokens" not in speculative:
        raise UserError("rollout.speculative_config has no num_speculative_tokens", "add how many tokens are drafted at a time, e.g. 4")
    drafted = speculative["num_speculative_tokens"]
    if not isinstance(drafted, int) or isinstance(drafted, bool) or drafted < 1:
        raise UserError(f"rollout.speculative_config.num_speculative_tokens is {drafted!r}", "use a whole number, 1 or more")
    method = str(speculative.get("method"))
    if not (method.startswith("ngram") or method == "suffix" or speculative.get("model")):
        raise UserError(f"rollout.speculative_config has method {method} and no model", "name the draft's directory as model, or use ngram")


def check_world(rollout: RolloutConfig, world: int) -> None:
    """Raise UserError where `world` processes do not divide into engines."""
    if world % rollout.tensor_parallel_size:
        raise UserError(
            f"rollout.tensor_parallel_size ({rollout.tensor_parallel_size}) does not divide the number of processes ({world})",
            "use a divisor of it",
        )

"""What no model, data or machine could make right is refused here, with the mend."""

import math
import re

from megatron_nft.config import engine, megatron
from megatron_nft.config.objective import AUTHORS_DAPO, OWN_SETTINGS, POLICY_GRADIENT, PUBLISHED
from megatron_nft.config.sampling import set_sampling
from megatron_nft.config.settings import PHASES, STAGES, Config, DatasetConfig, dataset_name, value_of
from megatron_nft.errors import UserError

LAST_PORT = 65535  # of TCP
MOST_ANSWERS = 16384  # to a problem
ANSWER_FROM = ("plain", "hash", "box")  # where in its column the gold is


def check(config: Config) -> None:
    """Raise UserError for values that no model, data or machine could make right."""
    if not config.run_dir:
        raise UserError("run_dir is empty", "name a directory")
    for key, allowed in _CHOICES.items():
        if value_of(config, key) not in allowed:
            raise UserError(f"{key} is {value_of(config, key)!r}", f"use one of {', '.join(map(str, allowed))}")
    for key, least in _LEAST.items():
        value = value_of(config, key)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise UserError(f"{key} is {value}", f"use a finite number, {least} or more")
    for key in _SHARES:
        if not 0 < value_of(config, key) <= 1:
            raise UserError(f"{key} is {value_of(config, key)}", "use a number above 0, up to 1")
    for key in ("optimizer.adam_beta1", "optimizer.adam_beta2"):
        if not 0 <= value_of(config, key) < 1:
            raise UserError(f"{key} is {value_of(config, key)}", "use a number from 0, below 1")
    for key in ("data.train", "evaluation.sets", "sft.data"):
        for number, dataset in enumerate(value_of(config, key)):
            _check_dataset(dataset, f"{key}[{number}]")
    _check_evaluation(config)
    _check_pairs(config)


def check_budget(config: Config) -> None:
    """Raise UserError where a micro-batch does not hold the longest prompt with its answer. Only training asks for that."""
    longest, budget = config.data.max_prompt_length + config.rollout.max_tokens, config.train.tokens_per_micro_batch
    if longest > budget:
        raise UserError(
            f"train.tokens_per_micro_batch ({budget}) is less than data.max_prompt_length + rollout.max_tokens ({longest})",
            "raise it, or lower one of them",
        )


def _check_dataset(dataset: DatasetConfig, key: str) -> None:
    if not dataset.path:
        raise UserError(f"{key}.path has no value", f"add it, or name a benchmark, or pass {key}.path=...")
    if "/" in dataset_name(dataset):
        raise UserError(f"{key}.name is {dataset_name(dataset)!r}", "leave out the slash: the name stands before one in ids and metrics")
    if dataset.limit is not None and dataset.limit < 1:
        raise UserError(f"limit of {dataset.path} is {dataset.limit}", "use 1 or more, or leave it out")
    if dataset.answer_from not in ANSWER_FROM:
        raise UserError(f"{key}.answer_from is {dataset.answer_from!r}", f"use one of {', '.join(ANSWER_FROM)}")
    if dataset.rewards and not dataset.source:
        raise UserError(f"{key}.rewards is set, but {key}.source is not", "name the column that names each row's source")


def _check_pairs(config: Config) -> None:
    """Raise UserError for settings that do not go together."""
    _check_objective(config)
    _check_correction(config)
    _check_groups(config)
    _check_order(config)
    _check_served(config)
    _check_batches(config)
    _check_watchdog(config)
    _check_profile(config)
    engine.check(config)
    megatron.check(config)


def _check_evaluation(config: Config) -> None:
    """What single sets say, and the names of results and checkpoint."""
    for dataset in config.evaluation.sets:
        name = dataset_name(dataset)
        for key, least in (("k", 0), ("temperature", _LEAST["evaluation.temperature"]), ("max_tokens", 1)):
            value = getattr(dataset, key)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise UserError(f"{key} of the set {name} is {value}", f"use a finite number, {least} or more")
        if not set_sampling(config, dataset).answers:
            raise UserError(f"greedy is false and k is 0 for the set {name}", "ask for a greedy answer or for k sampled ones")
        if set_sampling(config, dataset).k > MOST_ANSWERS:
            raise UserError(f"k of the set {name} is over {MOST_ANSWERS}", "use less: all requests are in memory at a time")
        if dataset.top_p is not None and not 0 < dataset.top_p <= 1:
            raise UserError(f"top_p of the set {name} is {dataset.top_p}", "use a number above 0, up to 1")
    name, chosen = config.evaluation.name, config.evaluation.checkpoint
    if name is not None and (not re.fullmatch(r"\w[\w.+@=-]{,99}", name) or re.fullmatch(r"step_\d+", name)):
        raise UserError(
            f"evaluation.name is {name!r}", "use up to 100 letters, digits and -_.+@=; step_N are the names of a training's validations"
        )
    if not re.fullmatch(r"best|newest|step_\d+", chosen):
        raise UserError(f"evaluation.checkpoint is {chosen!r}", "use best, newest or step_N")


def _check_objective(config: Config) -> None:
    """Each setting belongs to the objective, and its value is one that the objective knows."""
    settings = config.objective
    for key in OWN_SETTINGS:
        if key not in PUBLISHED[settings.name] and key != "reduction_constant" and getattr(settings, key) is not None:
            raise UserError(
                f"objective.{key} is set, but {settings.name} has no such setting",
                f"leave it out; {settings.name} has {', '.join(PUBLISHED[settings.name])}",
            )
    family = "policy gradient" if settings.name in POLICY_GRADIENT else "nft"
    allowed = (1, 2) if family == "policy gradient" else (0, 1, 2, "maxrl")
    if settings.normalize not in allowed:
        raise UserError(f"objective.normalize is {settings.normalize!r}", f"with {settings.name} use one of {', '.join(map(str, allowed))}")
    if family == "nft":
        _check_nft(config)
    elif settings.name != "topr" and not 0 <= settings.clip_ratio_low <= 1:
        raise UserError(f"objective.clip_ratio_low is {settings.clip_ratio_low}", "use a number from 0 to 1: R is kept above 1 - this")


def _check_nft(config: Config) -> None:
    settings = config.objective
    if not (settings.neg_weight >= 0 and math.isfinite(settings.neg_weight)):
        raise UserError(
            f"objective.neg_weight is {settings.neg_weight}",
            f"use 0 (RFT) or more (1 is NFT); exactly {AUTHORS_DAPO:g} is the NFT authors' spelling of objective.name=dapo",
        )
    if settings.name == "rft" and settings.neg_weight:
        raise UserError(f"objective.name is rft and objective.neg_weight {settings.neg_weight}", "use objective.name=nft, or leave it out")
    if not (settings.eps > 0 and math.isfinite(settings.eps)):
        raise UserError(f"objective.eps is {settings.eps}", "use a number above 0; the paper's is 1.0")
    if config.reward.overlong_buffer is not None:
        raise UserError(
            f"reward.overlong_buffer is set, but {settings.name} learns from verdicts alone",
            "set reward.overlong_buffer=null, or use an objective with advantages such as dapo",
        )


def _check_correction(config: Config) -> None:
    correction, ratio = config.objective.correction, config.objective.ratio
    if config.train.old_logprobs == "rollout" and config.rollout.top_p < 1:
        raise UserError(
            "train.old_logprobs is rollout and rollout.top_p below 1", "use recompute: the sampler's are log-probs of a cut distribution"
        )
    if correction.method == "none":
        return
    if config.train.old_logprobs == "rollout":
        raise UserError(
            f"objective.correction.method is {correction.method} and train.old_logprobs rollout",
            "use recompute: pi_old is the sampler's own, so there is nothing to correct",
        )
    if correction.level == "token" and ratio != "token":
        raise UserError(
            f"objective.ratio is {ratio} and objective.correction.level token",
            "use objective.correction.level=sequence or geometric: an answer with one ratio has one correction",
        )
    if not correction.cap > 0:
        raise UserError(f"objective.correction.cap is {correction.cap}", "use a number above 0, e.g. 2.0")
    if correction.method == "mask" and not 0 <= correction.floor <= correction.cap:
        raise UserError(
            f"objective.correction.floor is {correction.floor} and cap {correction.cap}", "use 0 <= floor <= cap, e.g. 0.5 and 2.0"
        )


def _check_groups(config: Config) -> None:
    """Answers of one prompt: enough of them for what the objective compares, and where they may end."""
    settings, n = config.objective, config.rollout.n
    alone = settings.name == "rft" and settings.normalize == 0  # right answers, whatever the others are
    if n == 1 and not alone:
        raise UserError(f"rollout.n is 1, but {settings.name} compares the answers to a prompt", "use 2 or more")
    if n == 1 and config.rollout.dynamic_sampling:
        raise UserError("rollout.n is 1 and rollout.dynamic_sampling true: no group of one answer is mixed", "set it to false")
    if config.rollout.function and config.rollout.mode == "served":
        raise UserError("rollout.function is set and rollout.mode served", "use rollout.mode=colocated: servers do not run functions")
    if config.rollout.function and config.rollout.tensor_parallel_size > 1:
        raise UserError(
            f"rollout.function is set and rollout.tensor_parallel_size {config.rollout.tensor_parallel_size}",
            "use 1: each rank of an engine would run the function, and what a tool says may differ between them",
        )
    buffer = config.reward.overlong_buffer
    if buffer is not None and buffer > config.rollout.max_tokens:
        raise UserError(
            f"reward.overlong_buffer ({buffer}) is longer than rollout.max_tokens ({config.rollout.max_tokens})",
            "lower it; DAPO's is a fifth of the longest answer",
        )


def _check_order(config: Config) -> None:
    """What rollout.order allows."""
    rollout = config.rollout
    if not 0 <= config.data.most_skipped < 1:
        raise UserError(
            f"data.most_skipped is {config.data.most_skipped}", "use 0 or more and less than 1, so that every prompt comes again"
        )
    if rollout.order == "prompt" and rollout.max_staleness:
        raise UserError(
            f"rollout.max_staleness is {rollout.max_staleness} and rollout.order prompt: what is carried depends on the engines' speed",
            "use rollout.order=started, or max_staleness=0",
        )
    if rollout.order == "prompt" and rollout.hopeless_after is not None:
        raise UserError(
            "rollout.hopeless_after is set and rollout.order prompt: which answers are finished first depends on the engines",
            "use rollout.order=started",
        )
    if rollout.hopeless_after is not None and rollout.hopeless_after >= rollout.n:
        raise UserError(
            f"rollout.hopeless_after ({rollout.hopeless_after}) is not less than rollout.n ({rollout.n}): by then a group is complete",
            "lower it, or leave it out",
        )
    if rollout.max_prompts_per_step is not None and rollout.max_prompts_per_step < rollout.prompts_per_step:
        raise UserError(
            f"rollout.max_prompts_per_step ({rollout.max_prompts_per_step}) is less than rollout.prompts_per_step "
            f"({rollout.prompts_per_step})",
            "raise it",
        )
    if (rollout.max_staleness or rollout.hopeless_after) and not rollout.dynamic_sampling:
        raise UserError(
            "rollout.max_staleness and rollout.hopeless_after are for rollout.dynamic_sampling, which is false", "leave them out"
        )


def _check_served(config: Config) -> None:
    addresses = config.rollout.served.addresses
    for address in addresses:
        found = re.fullmatch(r"http://[^/\s:]+:(\d+)/?", address)
        if not found or not 0 < int(found[1]) <= LAST_PORT:
            raise UserError(f"{address!r} in rollout.served.addresses is no address of a server", "write http://host:port")
    if len({address.rstrip("/") for address in addresses}) < len(addresses):
        raise UserError("rollout.served.addresses has an address twice", "leave one of them out")
    if config.rollout.served.port > LAST_PORT:
        raise UserError(f"rollout.served.port is {config.rollout.served.port}", f"use at most {LAST_PORT}, or 0 for any that is free")


def _check_batches(config: Config) -> None:
    if config.rollout.prompts_per_step % config.train.prompts_per_update:
        raise UserError(
            f"rollout.prompts_per_step ({config.rollout.prompts_per_step}) is no multiple of "
            f"train.prompts_per_update ({config.train.prompts_per_update})",
            "choose sizes that divide",
        )
    joined, tokens = config.train.logprob_tokens_per_micro_batch, config.train.tokens_per_micro_batch
    if joined is not None and joined < tokens:
        raise UserError(
            f"train.logprob_tokens_per_micro_batch ({joined}) is less than train.tokens_per_micro_batch ({tokens})",
            "use as much or more, or leave it out",
        )


def _check_watchdog(config: Config) -> None:
    for name, seconds in config.train.watchdog_phases.items():
        if name not in PHASES:
            raise UserError(f"train.watchdog_phases names {name!r}", f"use {', '.join(PHASES)}")
        if seconds < 0:
            raise UserError(f"train.watchdog_phases.{name} is {seconds}", "use seconds, 0 for no limit")


def _check_profile(config: Config) -> None:
    profile = config.profile
    for key, least in (("steps", 1), ("ranks", 0)):
        if wrong := [number for number in getattr(profile, key) if number < least]:
            raise UserError(f"profile.{key} has {wrong[0]}", f"use whole numbers, {least} or more")
    if wrong := [name for name in profile.stages if name not in STAGES]:
        raise UserError(f"profile.stages names {wrong[0]!r}", f"use {', '.join(STAGES)}")


_CHOICES = {
    "model.precision": ("auto", "bf16", "fp16", "fp32"),
    "model.fp8": (None, "hybrid", "e4m3"),
    "model.fp8_recipe": ("tensorwise", "delayed", "blockwise", "mxfp8"),
    "objective.name": tuple(PUBLISHED),
    "objective.ratio": ("token", "sequence", "geometric"),
    "objective.reduction": ("constant", "token-mean", "sequence-mean"),
    "objective.correction.method": ("none", "truncate", "mask"),
    "objective.correction.level": ("token", "sequence", "geometric"),
    "rollout.mode": ("colocated", "served"),
    "rollout.served.update": ("keep", "abort", "wait"),
    "rollout.order": ("prompt", "started", "finished"),
    "rollout.unfinished": ("resume", "drop"),
    "reward.truncated": ("wrong", "mask", "drop"),
    "train.old_logprobs": ("recompute", "rollout"),
    "train.offload": (None, "none", "gradients", "optimizer", "all"),
    "rollout.cudagraph_mode": (None, "NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"),
    "train.recompute_granularity": (None, "full", "selective"),
    "train.recompute_method": (None, "uniform", "block"),
    "optimizer.main_grads_dtype": ("fp32", "bf16"),
    "optimizer.main_params_dtype": ("fp32", "fp16"),
    "optimizer.exp_avg_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "optimizer.exp_avg_sq_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "logging.wandb": ("disabled", "offline", "online"),
}
_SHARES = ("rollout.top_p", "evaluation.top_p", "rollout.gpu_memory_utilization", "optimizer.optimizer_offload_fraction")
_LEAST = {
    "seed": 0,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_model_parallel_size": 1,
    "parallel.context_parallel_size": 1,
    "parallel.expert_model_parallel_size": 1,
    "parallel.expert_tensor_parallel_size": 1,
    "data.max_prompt_length": 1,
    "rollout.prompts_per_step": 1,
    "rollout.max_prompts_per_step": 1,
    "rollout.max_staleness": 0,
    "rollout.hopeless_after": 2,
    "rollout.n": 1,
    "rollout.temperature": 1e-3,
    "rollout.max_tokens": 1,
    "rollout.tensor_parallel_size": 1,
    "rollout.max_num_seqs": 1,
    "rollout.max_num_batched_tokens": 1,
    "rollout.cpu_kvcache_space": 1,
    "rollout.update_weights_bucket_megabytes": 1,
    "rollout.check_sync_interval": 0,
    "rollout.logprob_tolerance": 0.0,
    "rollout.served.count": 1,
    "rollout.served.port": 0,
    "rollout.served.stream_interval": 1,
    "rollout.served.start_timeout": 1,
    "rollout.served.token_timeout": 1,
    "rollout.served.transfer_timeout": 1,
    "rollout.served.max_deaths": 1,
    "reward.workers": 1,
    "reward.time_limit": 1,
    "reward.concurrency": 1,
    "reward.memory_limit": 1,
    "reward.overlong_buffer": 1,
    "objective.clip_ratio_low": 0.0,
    "objective.clip_ratio_high": 0.0,
    "objective.reduction_constant": 1e-12,
    "objective.correction.cap": 0.0,
    "optimizer.lr": 0.0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.adam_eps": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_grad": 0.0,
    "optimizer.initial_loss_scale": 1.0,
    "optimizer.min_loss_scale": 1e-12,
    "optimizer.loss_scale_window": 1,
    "optimizer.hysteresis": 1,
    "model.num_layers_at_start_in_bf16": 0,
    "model.num_layers_at_end_in_bf16": 0,
    "train.recompute_num_layers": 1,
    "train.steps": 0,
    "train.watchdog_timeout": 0,
    "train.sampled_tokens": 1,
    "train.prompts_per_update": 1,
    "train.tokens_per_micro_batch": 1,
    "evaluation.interval": 0,
    "evaluation.k": 0,
    "evaluation.temperature": 1e-3,
    "evaluation.max_tokens": 1,
    "checkpoint.interval": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "checkpoint.grace_time": 1,
    "logging.coefficient_answers": 0,
    "sft.steps": 0,
    "sft.sequences_per_update": 1,
}

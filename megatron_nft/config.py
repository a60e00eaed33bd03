"""Every setting, with its default: one tree of dataclasses, read from YAML and key=value overrides.

An unknown key, a missing value or a value of the wrong type is a UserError that names the key.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_nft.errors import UserError


@dataclass
class ModelConfig:
    path: str = MISSING  # Hugging Face directory: config.json, safetensors, tokenizer
    precision: str = "auto"  # auto (bf16 with CUDA, fp32 without) | bf16 | fp32


@dataclass
class ParallelConfig:
    """Megatron-Core's layout; the rest of the world size is data parallel."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False


@dataclass
class DatasetConfig:
    """A data set: a local .jsonl, .json or .parquet file, or a name on the Hugging Face hub."""

    path: str = MISSING
    name: str | None = None  # default: the file's stem; names the set in metrics
    split: str = "train"  # for the hub
    subset: str | None = None  # for the hub: the configuration, e.g. main
    question: str = "problem"  # column; "prompt" may hold a list of {role, content}
    answer: str = "answer"  # column; dots reach into structures: reward_model.ground_truth
    solution: str = "solution"  # column with the worked answer, for sft
    reward: str | None = None  # verdict function for this set; default: reward.function
    limit: int | None = None  # the first so many rows


DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


def dataset_name(dataset: DatasetConfig) -> str:
    """The name of the set in metrics and as the source of its prompts: `name`, or the stem of the path."""
    path = Path(dataset.path)
    return dataset.name or (path.stem if path.suffix in DATA_SUFFIXES else path.name)


@dataclass
class DataConfig:
    train: list[DatasetConfig] = field(default_factory=list)
    system: str | None = None  # system turn of the chat
    instruction: str = ""  # appended to the question in the user turn, on a line of its own
    max_prompt_length: int = 512  # tokens; longer prompts are dropped and counted
    shuffle: bool = True


@dataclass
class RolloutConfig:
    prompts_per_step: int = 64  # mixed groups to train on in a rollout step
    n: int = 8  # answers per prompt
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512  # of an answer
    prompts_per_draw: int | None = None  # prompts sent at a time; default: prompts_per_step
    max_draws: int = 8  # then train on what was kept
    save: bool = True  # rollouts/step_N.parquet
    # the engine: vLLM's names
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.6
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384  # on CPU no prompt may be split, so keep it above max_prompt_length
    cpu_kvcache_space: int = 2  # GiB, CPU only
    enforce_eager: bool = False


@dataclass
class RewardConfig:
    function: str = "strict_box"  # strict_box | math_verify | package.module:function | path/to/file.py:function
    workers: int = 2  # processes
    time_limit: int = 2  # seconds for one verdict; then the worker is killed


@dataclass
class ObjectiveConfig:
    """NFT, ALGORITHM section 1. neg_weight 0 is RFT."""

    name: str = "nft"
    neg_weight: float = 1.0
    normalize: int = 1  # prompt weight w: 0 -> 1, 1 -> 1 - r̂, 2 -> sqrt((1 - r̂) / r̂)
    eps: float = 1.0
    ratio: str = "token"  # token | sequence
    reduction: str = "constant"  # constant | token-mean | sequence-mean
    reduction_constant: float = 1000.0  # divides the sum over the whole mini-batch


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    lr_warmup_iters: int = 0  # optimiser updates, linear; constant afterwards
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    steps: int = 100  # rollout steps
    prompts_per_update: int = 16  # a mini-batch: groups per optimiser update
    tokens_per_micro_batch: int = 4096  # fixed length of a packed micro-batch, per rank
    old_logprobs: str = "recompute"  # recompute (a Megatron forward pass) | rollout (the sampler's)
    recompute_granularity: str | None = None  # Megatron's: None | full


@dataclass
class EvaluationConfig:
    """Validation during training, and `megatron-nft evaluate`."""

    sets: list[DatasetConfig] = field(default_factory=list)
    interval: int = 10  # rollout steps between validations; 0: never
    k: int = 8  # answers per problem for avg@k
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True  # also one greedy answer per problem
    max_tokens: int | None = None  # default: rollout.max_tokens


@dataclass
class CheckpointConfig:
    interval: int = 50  # rollout steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept
    export: bool = True  # at the end, a Hugging Face directory at run_dir/huggingface


@dataclass
class LoggingConfig:
    wandb: str = "disabled"  # disabled | offline | online
    project: str = "megatron_nft"
    name: str | None = None


@dataclass
class SftConfig:
    """The supervised warm start (`megatron-nft sft`)."""

    data: list[DatasetConfig] = field(default_factory=list)
    steps: int = 100  # optimiser updates
    sequences_per_update: int = 64


@dataclass
class Config:
    run_dir: str = MISSING
    seed: int = 1
    resume: bool = True  # continue from the newest complete checkpoint of run_dir, where there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sft: SftConfig = field(default_factory=SftConfig)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and key=value overrides (dotted keys) into a Config, and check it.

    Raises UserError for a missing file, an unknown key (with the nearest known one), a wrong type or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file at {path}", "give the path of a YAML file, e.g. examples/arithmetic/nft.yaml")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"cannot read the override {override!r}", "write it as key=value, e.g. train.steps=10")
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), _read(path))
        for override in overrides:
            key, value = override.split("=", 1)
            OmegaConf.update(tree, key, _parse(value, override))  # reaches into lists, too: evaluation.sets.0.path
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise _explain(error, path) from None
    except TypeError as error:  # OmegaConf's for a list where a mapping belongs, or the other way round
        raise UserError(f"{path} or an override puts a list where a mapping belongs, or the other way round ({error})",
                        "compare with megatron_nft/config.py") from None  # fmt: skip
    check(config)
    return config


def _read(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} of {path}" if mark else str(path)
        raise UserError(f"{where} is not YAML ({getattr(error, 'problem', None) or error})", "mend the YAML") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file", "give a YAML file in UTF-8") from None
    except OSError:  # OmegaConf's answer to a file that holds one number or word
        tree = None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} holds no settings", "write one `key: value` a line, as in examples/arithmetic/nft.yaml")
    return tree


def _parse(value: str, override: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(
            f"cannot read the override {override!r} ({problem})", "write the value as in YAML, in quotes where it needs them"
        ) from None


def save(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def check(config: Config) -> None:
    """Raise UserError for values that no model, data or machine could make right."""
    if not config.run_dir:
        raise UserError("run_dir is empty", "name a directory")
    for key, allowed in _CHOICES.items():
        if _value(config, key) not in allowed:
            raise UserError(f"{key} is {_value(config, key)!r}", f"use one of {', '.join(map(str, allowed))}")
    for key, least in _LEAST.items():
        value = _value(config, key)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise UserError(f"{key} is {value}", f"use {least} or more")
    for key in _SHARES:
        if not 0 < _value(config, key) <= 1:
            raise UserError(f"{key} is {_value(config, key)}", "use a number above 0, up to 1")
    for key in ("optimizer.adam_beta1", "optimizer.adam_beta2"):
        if not 0 <= _value(config, key) < 1:
            raise UserError(f"{key} is {_value(config, key)}", "use a number from 0, below 1")
    for dataset in [*config.data.train, *config.evaluation.sets, *config.sft.data]:
        if dataset.limit is not None and dataset.limit < 1:
            raise UserError(f"limit of {dataset.path} is {dataset.limit}", "use 1 or more, or leave it out")
    _check_pairs(config)


def _check_pairs(config: Config) -> None:
    """Raise UserError for settings that do not go together."""
    if not config.objective.eps > 0:
        raise UserError(f"objective.eps is {config.objective.eps}", "use a number above 0; the paper's is 1.0")
    if config.train.old_logprobs == "rollout" and config.rollout.top_p < 1:
        raise UserError(
            "train.old_logprobs is rollout and rollout.top_p below 1", "use recompute: the sampler's are log-probs of a cut distribution"
        )
    if config.rollout.prompts_per_step % config.train.prompts_per_update:
        raise UserError(
            f"rollout.prompts_per_step ({config.rollout.prompts_per_step}) is no multiple of "
            f"train.prompts_per_update ({config.train.prompts_per_update})",
            "choose sizes that divide",
        )
    parallel = config.parallel
    if parallel.sequence_parallel and config.train.tokens_per_micro_batch % parallel.tensor_model_parallel_size:
        raise UserError(
            f"train.tokens_per_micro_batch ({config.train.tokens_per_micro_batch}) cannot be divided by "
            f"parallel.tensor_model_parallel_size ({parallel.tensor_model_parallel_size}), which sequence_parallel asks for",
            "choose a multiple",
        )


def _value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def max_answer_length(config: Config) -> int:
    """Tokens of the longest answer, in training or in validation."""
    return max(config.rollout.max_tokens, config.evaluation.max_tokens or 0)


def max_model_len(config: Config) -> int:
    """Tokens of the longest prompt with the longest answer: the engine's window, under vLLM's name."""
    return config.data.max_prompt_length + max_answer_length(config)


_CHOICES = {
    "model.precision": ("auto", "bf16", "fp32"),
    "objective.name": ("nft",),
    "objective.normalize": (0, 1, 2),
    "objective.ratio": ("token", "sequence"),
    "objective.reduction": ("constant", "token-mean", "sequence-mean"),
    "train.old_logprobs": ("recompute", "rollout"),
    "train.recompute_granularity": (None, "full"),
    "logging.wandb": ("disabled", "offline", "online"),
}
_SHARES = ("rollout.top_p", "evaluation.top_p", "rollout.gpu_memory_utilization")
_LEAST = {
    "seed": 0,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "data.max_prompt_length": 1,
    "rollout.prompts_per_step": 1,
    "rollout.prompts_per_draw": 1,
    "rollout.n": 2,
    "rollout.temperature": 1e-3,
    "rollout.max_tokens": 1,
    "rollout.max_draws": 1,
    "rollout.tensor_parallel_size": 1,
    "rollout.max_num_seqs": 1,
    "rollout.max_num_batched_tokens": 1,
    "rollout.cpu_kvcache_space": 1,
    "reward.workers": 1,
    "reward.time_limit": 1,
    "objective.neg_weight": 0.0,
    "objective.reduction_constant": 1e-12,
    "optimizer.lr": 0.0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.adam_eps": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_grad": 0.0,
    "train.steps": 0,
    "train.prompts_per_update": 1,
    "train.tokens_per_micro_batch": 1,
    "evaluation.interval": 0,
    "evaluation.k": 0,
    "evaluation.temperature": 1e-3,
    "evaluation.max_tokens": 1,
    "checkpoint.interval": 0,
    "checkpoint.keep": 1,
    "sft.steps": 0,
    "sft.sequences_per_update": 1,
}


def _explain(error: OmegaConfBaseException, path: Path) -> UserError:
    """OmegaConf's error as one line with the key and the mend."""
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or "?"
    message = str(error).splitlines()[0]
    if "not in" in message and "Key" in message:
        known = list(known_keys())
        leaf = str(key).rsplit(".", 1)[-1]
        if re.search(r"\[\d+\]\.", str(key)):  # within a list of data sets
            known = [str(key).removesuffix(leaf) + f.name for f in dataclasses.fields(DatasetConfig)]
        near = difflib.get_close_matches(str(key), known, 1) or [k for k in known if k.rsplit(".", 1)[-1] == leaf]
        return UserError(f"unknown setting {key} (in {path} or on the command line)",
                         f"did you mean {near[0]}?" if near else "see megatron_nft/config.py for all settings")  # fmt: skip
    if "MISSING" in message or "mandatory" in message.lower():
        return UserError(f"{key} has no value in {path}", f"add it, or pass {key}=...")
    return UserError(f"{key}: {message} (in {path} or on the command line)", "mend the value")


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted names of all settings."""
    keys = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            keys += known_keys(f.type, f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys

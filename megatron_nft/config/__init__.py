"""Every setting, with its default: one tree of dataclasses (settings), what each objective's paper sets (objective), how YAML, presets
and key=value overrides become that tree (loading), and what is refused (checks)."""

from megatron_nft.config.benchmarks import BENCHMARKS, DATA_SUFFIXES, Benchmark
from megatron_nft.config.checks import check, check_budget
from megatron_nft.config.keeping import best_kept
from megatron_nft.config.loading import describe, known_keys, load, load_with_sources, preset_names, save
from megatron_nft.config.objective import POLICY_GRADIENT
from megatron_nft.config.sampling import SetSampling, max_answer_length, max_model_len, samplings, set_sampling
from megatron_nft.config.settings import (
    STAGES,
    Config,
    CorrectionConfig,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    EvaluationSetConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PlanConfig,
    ProfileConfig,
    RewardConfig,
    RolloutConfig,
    ServedConfig,
    TrainConfig,
    dataset_name,
)

__all__ = [
    "BENCHMARKS",
    "DATA_SUFFIXES",
    "POLICY_GRADIENT",
    "STAGES",
    "Benchmark",
    "Config",
    "CorrectionConfig",
    "DataConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "EvaluationSetConfig",
    "LoggingConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "ProfileConfig",
    "RewardConfig",
    "RolloutConfig",
    "ServedConfig",
    "SetSampling",
    "TrainConfig",
    "best_kept",
    "check",
    "check_budget",
    "dataset_name",
    "describe",
    "known_keys",
    "load",
    "load_with_sources",
    "max_answer_length",
    "max_model_len",
    "preset_names",
    "samplings",
    "save",
    "set_sampling",
]

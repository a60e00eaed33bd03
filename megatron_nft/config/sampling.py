"""How each evaluation set is sampled, and how long what is sampled can become."""

import difflib
from dataclasses import dataclass

from megatron_nft.config.settings import Config, EvaluationConfig, EvaluationSetConfig, dataset_name
from megatron_nft.errors import UserError


@dataclass(frozen=True)
class SetSampling:
    """The answers to each problem of a set: a greedy one, where `greedy` says so, and k sampled ones."""

    greedy: bool
    k: int
    temperature: float
    top_p: float
    max_tokens: int

    @property
    def answers(self) -> int:
        """To a problem."""
        return self.greedy + self.k

    @property
    def accuracies(self) -> list[str]:
        """The names of its accuracies in metrics.jsonl, behind validation/<set>/."""
        return ["greedy"] * self.greedy + [f"avg@{self.k}"] * bool(self.k)


def set_sampling(config: Config, dataset: EvaluationSetConfig) -> SetSampling:
    """What the set says, and evaluation.* where it says nothing; rollout.max_tokens where nothing says how long an answer may be."""
    evaluation = config.evaluation

    def of(key: str):
        own = getattr(dataset, key)
        return getattr(evaluation, key) if own is None else own

    return SetSampling(of("greedy"), of("k"), of("temperature"), of("top_p"), of("max_tokens") or config.rollout.max_tokens)


def samplings(config: Config) -> dict[str, SetSampling]:
    """Of all evaluation sets, by name."""
    return {dataset_name(dataset): set_sampling(config, dataset) for dataset in config.evaluation.sets}


def choose_sets(evaluation: EvaluationConfig) -> None:
    """Leave only the sets that evaluation.only names. Raises UserError for a name that no set has."""
    names = [dataset_name(dataset) for dataset in evaluation.sets] if evaluation.only else []
    for name in evaluation.only:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            mend = f"did you mean {near[0]}?" if near else f"use {', '.join(names)}" if names else "name data sets under evaluation.sets"
            raise UserError(f"evaluation.only names {name!r}, which is no set of evaluation.sets", mend)
    if evaluation.only:
        evaluation.sets = [dataset for dataset in evaluation.sets if dataset_name(dataset) in evaluation.only]


def max_answer_length(config: Config) -> int:
    """Tokens of the longest answer, in training or in validation."""
    return max(config.rollout.max_tokens, config.evaluation.max_tokens or 0, *(one.max_tokens or 0 for one in config.evaluation.sets))


def max_model_len(config: Config) -> int:
    """Tokens of the longest prompt with the longest answer: the engine's window, under vLLM's name."""
    return config.data.max_prompt_length + max_answer_length(config)

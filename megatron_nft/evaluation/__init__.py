"""Benchmarks: avg@k, pass@j and maj@k with their intervals, in a training as its validation and by itself, with the answers kept."""

from megatron_nft.evaluation.command import evaluate_model
from megatron_nft.evaluation.compare import compare
from megatron_nft.evaluation.problems import check
from megatron_nft.evaluation.rejudge import rejudge
from megatron_nft.evaluation.run import Evaluation, answers_expected, evaluate, validate, write_results
from megatron_nft.evaluation.source import opened

__all__ = [
    "Evaluation",
    "answers_expected",
    "check",
    "compare",
    "evaluate",
    "evaluate_model",
    "opened",
    "rejudge",
    "validate",
    "write_results",
]

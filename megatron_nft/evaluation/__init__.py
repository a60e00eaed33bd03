"""Benchmarks: avg@k, pass@j and maj@k with their intervals, in a training as its validation and by itself, with the answers kept.

problems: what is asked. evaluate: one evaluation on an engine. scores: from verdicts to numbers. answers: what is kept, and goes on.
source: which model. command: `megatron-nft evaluate`. rejudge: new verdicts for saved answers. compare: two evaluations side by side.
tables, page: how results are shown. What shows and compares needs neither torch nor vLLM, so this package imports nothing by itself.
"""

"""From data sets to Prompts, and the cursor that training reads them from.

tables: a file or the hub, row by row. rows: its columns under one name each. filters: which rows are used. templates, instructions: the
text around a question. sets: all of it together. cursor: where training stands. contamination: benchmark problems in the training data.
"""

from megatron_nft.prompts.cursor import Cursor
from megatron_nft.prompts.rows import load_rows
from megatron_nft.prompts.sets import PromptSet, distinct_rows, load_prompts, load_sets, load_tokenizer
from megatron_nft.prompts.templates import Template

__all__ = [
    "Cursor", "PromptSet", "Template", "distinct_rows", "load_prompts", "load_rows", "load_sets", "load_tokenizer",
]  # fmt: skip

"""Hugging Face names <-> Megatron names: one declarative table per model family, streaming, and Hugging Face directories.

Pure torch: nothing here imports Megatron-Core or vLLM.
"""

from megatron_nft.weights.buckets import Bucket, Buffers, Slot
from megatron_nft.weights.families import table_for
from megatron_nft.weights.huggingface import HuggingFaceWeights, load_huggingface, read_json
from megatron_nft.weights.layouts import padded_vocab_size
from megatron_nft.weights.resume import NoRoom, Unfinished, check_vacant, resumable, stamps
from megatron_nft.weights.safetensors_files import Kind
from megatron_nft.weights.source import MANIFEST, is_checkpoint, load_weights, read_buckets
from megatron_nft.weights.stream import stream
from megatron_nft.weights.table import Entry, Table, expert_number, with_expert
from megatron_nft.weights.tokenizer import check_tokenizer
from megatron_nft.weights.torch_dist import TorchDistWeights, find_iteration
from megatron_nft.weights.writer import check_companions, convert_to_huggingface, copy_companions, save_huggingface, whole_or_nothing

__all__ = [
    "MANIFEST",
    "Bucket",
    "Buffers",
    "Entry",
    "HuggingFaceWeights",
    "Kind",
    "NoRoom",
    "Slot",
    "Table",
    "TorchDistWeights",
    "Unfinished",
    "check_companions",
    "check_tokenizer",
    "check_vacant",
    "convert_to_huggingface",
    "copy_companions",
    "expert_number",
    "find_iteration",
    "is_checkpoint",
    "load_huggingface",
    "load_weights",
    "padded_vocab_size",
    "read_buckets",
    "read_json",
    "resumable",
    "save_huggingface",
    "stamps",
    "stream",
    "table_for",
    "whole_or_nothing",
    "with_expert",
]

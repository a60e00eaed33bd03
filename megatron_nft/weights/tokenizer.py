"""What a directory's tokenizer files say of their number of tokens, read without a tokenizer library."""

from pathlib import Path

from megatron_nft.errors import UserError
from megatron_nft.files import AGAIN, read_json

FAST, VOCABULARY, ADDED = "tokenizer.json", "vocab.json", "added_tokens.json"


def check_tokenizer(directory: Path, rows: int) -> None:
    """Raise UserError for a tokenizer whose ids go beyond an embedding of so many rows: its last tokens would read what is no embedding.

    Files that are not there, or not of these kinds, say nothing.
    """
    file = next((directory / name for name in (FAST, VOCABULARY) if (directory / name).is_file()), None)
    if file is None:
        return
    tokens = 1 + max(_ids(file) + (_ids(directory / ADDED) if (directory / ADDED).is_file() else []), default=-1)
    if tokens > rows:
        raise UserError(f"the tokenizer in {directory} has {tokens} tokens, and the model's embedding {rows} rows (vocab_size)",
                        "take config.json and the tokenizer of one model, or add rows to the embedding")  # fmt: skip


def _ids(file: Path) -> list[int]:
    """Token ids in a file. Raises UserError for one that is not of the form its name says."""
    content = read_json(file)
    try:
        if file.name != FAST:
            return [number for number in content.values() if isinstance(number, int)]
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))  # a list: by place
        return [int(number) for number in ids + [token["id"] for token in content.get("added_tokens") or []]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has not the form of a tokenizer ({error!r})", AGAIN) from None

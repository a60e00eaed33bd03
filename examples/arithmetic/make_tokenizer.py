"""The demo's tokenizer: Qwen2's kind (byte-level BPE, one token a digit), trained on the demo's own sentences, ChatML format.

    python examples/arithmetic/make_tokenizer.py OUT_DIR

writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer and vLLM load like any other Qwen2's.
"""

import argparse
import json
from pathlib import Path

import make_data
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
SIZE = 304  # 256 bytes, the special tokens, and the words of the demo
SENTENCES = 500
# how Qwen2 cuts a text before its bytes are merged: contractions, words, single digits, punctuation, white space
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build() -> Tokenizer:
    """The tokenizer, the same every time."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = BpeTrainer(vocab_size=SIZE, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def sentences() -> list[str]:
    """Whole conversations of the demo."""
    rows = make_data.rows("train", SENTENCES)
    return [f"system\nuser\n{row['problem']}\nassistant\n{row['solution']}" for row in rows]


def write(out: Path) -> None:
    """Write the tokenizer's two files into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    build().save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()

"""The demo's tokenizer: one token per digit, a few whole words, every printable ASCII character, Qwen2's chat format.

    python examples/arithmetic/make_tokenizer.py OUT_DIR

writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer and vLLM load like any other.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import Unigram

END_OF_TEXT, TURN_START, TURN_END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, UNKNOWN)
WORDS = ("system", "user", "assistant", "What is ", "Compute ", " times ", " plus ", " minus ", "\\boxed{", ", ", ". ")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build() -> Tokenizer:
    """The tokenizer. A Unigram model takes the split of highest score: whole words where they fit, characters elsewhere."""
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(word, -1.0) for word in WORDS] + [(character, -2.0) for character in CHARACTERS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIAL.index(UNKNOWN), byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()  # tokens are joined as they are: no space between them
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write(out: Path) -> None:
    """Write the tokenizer's two files into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    build().save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
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

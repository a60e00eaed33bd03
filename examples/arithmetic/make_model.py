"""The demo's model before any training: a small Qwen2 with random weights, its config and its tokenizer.

    python examples/arithmetic/make_model.py OUT_DIR [--seed S]

OUT_DIR is what `megatron-nft sft` starts from.
"""

import argparse
from pathlib import Path

import make_tokenizer
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def config() -> Qwen2Config:
    """1.6 million parameters; heads, key-value heads and layers can be divided by two."""
    tokenizer = make_tokenizer.build()
    return Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(make_tokenizer.TURN_END),
        pad_token_id=tokenizer.token_to_id(make_tokenizer.END_OF_TEXT),
        dtype="float32",
    )


def write(out: Path, seed: int) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into a directory."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config())
    model.save_pretrained(out)
    make_tokenizer.write(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    write(given.out, given.seed)


if __name__ == "__main__":
    main()

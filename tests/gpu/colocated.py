"""The model and the settings of colocated_worker.py."""

from pathlib import Path

import torch

from tests.support import add_tokenizer, run_ranks, tiny_model

WORKER = Path(__file__).with_name("colocated_worker.py")
GPU = torch.cuda.is_available()
CACHE = 8 * 2**30  # bytes of the key-value cache on a GPU
ROUNDS = 11 if GPU else 2  # of generation and training: the first, and ten after it
CONFIG = """
run_dir: unused
seed: 1
model: {path: PATH}
data: {max_prompt_length: 64}
train: {prompts_per_update: 4, tokens_per_micro_batch: 512, offload: all}
rollout: {n: 4, prompts_per_step: 8, max_tokens: 48, max_num_seqs: 64, cpu_kvcache_space: 1, enable_prefix_caching: false}
objective: {name: nft, reduction: token-mean}
optimizer: {lr: 1.0e-4, weight_decay: 0.0}
"""
# on a GPU 50 million parameters: what would be left behind in each round adds up to hundreds of MiB
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4, "initializer_range": 0.03}
TINY = {"hidden_size": 128, "initializer_range": 0.1}
# a start that compiles nothing, and captures few graphs: that both work is shown with weights in bf16
QUICK = ["rollout.max_num_seqs=32", "rollout.vllm.compilation_config={mode: 0, cudagraph_mode: FULL_DECODE_ONLY}"]
COMMON = {"vocab_size": 304, "eos_token_id": 2, "max_position_embeddings": 512}


def run(folder: Path, fp8: bool) -> dict:
    """What the worker found, and in `end` the error that it ended with. fp8: the sampler quantises its weights."""
    model = add_tokenizer(tiny_model(folder / "model", **COMMON, **(SIZES if GPU else TINY)))
    config, output = folder / "config.yaml", folder / "out.pt"
    config.write_text(CONFIG.replace("PATH", str(model)))
    overrides = [f"rollout.vllm.kv_cache_memory_bytes={CACHE}", "rollout.gpu_memory_utilization=0.15"] if GPU else []
    overrides += ["rollout.quantization=fp8", *(QUICK if GPU else [])] if fp8 else []
    arguments = {"config": str(config), "overrides": overrides, "output": str(output), "rounds": 1 if fp8 else ROUNDS}
    end = ""
    try:
        run_ranks(WORKER, 1, arguments, folder, timeout=300 if GPU else 600)
    except AssertionError as error:  # what was found before the end is still worth a look
        if not output.exists():
            raise
        end = str(error)
    return torch.load(output) | {"end": end}

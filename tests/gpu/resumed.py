"""Runs of the command line: the arithmetic example, once straight on, once stopped in its second half and resumed."""

from pathlib import Path

import torch

from tests.end_to_end import runs

GPU = torch.cuda.is_available()
STEPS, HALF = (4, 2) if GPU else (2, 1)
SETTINGS = [
    f"train.steps={STEPS}",
    f"checkpoint.interval={HALF}",
    "megatron.transformer.deterministic_mode=true",
    "rollout.prompts_per_step=8",
    "rollout.dynamic_sampling=false",  # which answers run beside each other then is no question of when verdicts come
    "rollout.max_num_seqs=64",
    "rollout.cpu_kvcache_space=1",
    "train.prompts_per_update=4",
    "train.tokens_per_micro_batch=512",
    "evaluation.interval=0",
]
# graphs are colocated_worker.py's; a start without compiling is that of another program
ON_A_GPU = ["rollout.enforce_eager=true", "rollout.gpu_memory_utilization=0.1", "rollout.vllm.kv_cache_memory_bytes=8589934592"]
# as on a GPU, where nothing is packed: log-probs are compared after a process's first sync alone
ON_A_CPU = ["rollout.check_sync_interval=0"]


def run(folder: Path) -> dict:
    """The run directories, what the two runs printed, and the numbers of their steps."""
    settings, log = SETTINGS + (ON_A_GPU if GPU else ON_A_CPU), folder / "log"
    runs.run("train", folder / "straight", *settings, log=log)
    stop = {"stage": "generate", "step": HALF + 1, "after": 0.0, "signal": "SIGTERM"}
    stopped = runs.run("train", folder / "parts", *settings, log=folder / "stopped.log", at=stop, code=75)
    resumed = runs.run("train", folder / "parts", *settings, log=folder / "resumed.log")
    found = {"straight": folder / "straight", "parts": folder / "parts", "steps": STEPS, "half": HALF}
    return found | {"stopped": stopped, "resumed": resumed, "printed": log.read_text()}

"""The recipes: each says what a job runs and how large it is. Variables and settings are those of slurm/*.sbatch."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run

from megatron_nft import config as configs
from megatron_nft.errors import UserError
from megatron_nft.recipes import jobs


@dataclass(frozen=True)
class Shape:
    """The allocation that a recipe is for. Travels in the script's metadata, from which `fit` takes it."""

    nodes: int
    ranks_per_node: int  # one task each
    gpus_per_node: int  # 0: a run on CPUs
    time: str  # Slurm's limit
    notice: int  # seconds before the limit at which the ranks are told to save
    cpus_per_task: int | None = None


def nft_tiny(settings: list[str] | None = None, config: str = "", checkout: str = "") -> run.Script:
    """The demo (examples/arithmetic) on two nodes without GPUs, two ranks on each; with run.executor=local on this machine."""
    shape = Shape(nodes=2, ranks_per_node=2, gpus_per_node=0, time="01:00:00", notice=180, cpus_per_task=2)
    return _script(shape, config or "examples/arithmetic/nft.yaml", _with_run_dir("runs/nft-tiny", 120), settings, checkout)


def nft_7b(settings: list[str] | None = None, config: str = "", checkout: str = "") -> run.Script:
    """NFT on Qwen2.5-Math-7B: 4 nodes of 8 GPUs, a rank each. MODEL, TRAIN and RUN_DIR as for slurm/nft_7b.sbatch."""
    shape = Shape(nodes=4, ranks_per_node=8, gpus_per_node=8, time="24:00:00", notice=300)
    own = [*_with_run_dir("runs/nft-7b", 240), *_data("models/Qwen2.5-Math-7B")]
    return _script(shape, config or "examples/qwen2.5_math_7b/nft.yaml", own, settings, checkout)


def nft_32b(settings: list[str] | None = None, config: str = "", checkout: str = "") -> run.Script:
    """NFT on Qwen2.5-32B: 16 nodes of 8 GPUs, a rank each. MODEL, TRAIN and RUN_DIR as for slurm/nft_32b.sbatch."""
    shape = Shape(nodes=16, ranks_per_node=8, gpus_per_node=8, time="24:00:00", notice=600)
    own = [*_with_run_dir("runs/nft-32b", 540), *_data("models/Qwen2.5-32B")]
    return _script(shape, config or "examples/qwen2.5_32b/nft.yaml", own, settings, checkout)


RECIPES = (nft_tiny, nft_7b, nft_32b)


def _with_run_dir(default: str, grace_time: int) -> list[str]:
    return [f"run_dir={os.environ.get('RUN_DIR', default)}", f"checkpoint.grace_time={grace_time}"]


def _data(model: str) -> list[str]:
    train = os.environ.get("TRAIN", "data/dapo_math_17k.parquet")
    return [f"model.path={os.environ.get('MODEL', model)}", f"data.train=[{{benchmark: dapo_math_17k, path: {train}}}]"]


def _script(shape: Shape, default_config: str, own: list[str], settings: list[str] | None, checkout: str) -> run.Script:
    """The script of a recipe, its settings checked as far as this machine knows them. Raises UserError."""
    checkout = checkout or os.environ.get("CHECKOUT", os.getcwd())
    config, settings = os.environ.get("CONFIG", default_config), [*own, *(settings or [])]
    metadata = {"shape": dataclasses.asdict(shape), "checkout": checkout, **_known(checkout, config, settings)}
    return run.Script(inline=jobs.task(checkout, [config, *settings]), metadata=metadata)


def _known(checkout: str, config: str, settings: list[str]) -> dict[str, str | int]:
    """What `fit` needs of the settings. Whoever launches over SSH may have the config file in a checkout here, too, or not at all."""
    path = next((p for p in (Path(checkout, config), Path(config)) if p.is_file()), None)
    if path:
        return _of_config(configs.load(path, settings))
    if Path(checkout).is_dir():
        raise UserError(f"no config file at {Path(checkout, config)}", "pass config=FILE, or checkout=DIR of a checkout on the cluster")
    return {"run_dir": next(word.partition("=")[2] for word in reversed(settings) if word.startswith("run_dir=")), "ranks_divide_by": 1}


def _of_config(config: configs.Config) -> dict[str, str | int]:
    if config.rollout.mode == "served":
        raise UserError("a recipe starts no servers, which rollout.mode=served needs", "submit slurm/nft_32b_served.sbatch")
    sizes = config.parallel
    model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    return {"run_dir": config.run_dir, "ranks_divide_by": model}

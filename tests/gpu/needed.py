"""Says which modules the tests of this folder need and this Python does not have; exit code 2 if any. What may be left out is told of."""

import importlib.util
import sys

# of `megatron-nft train` on the arithmetic example, and of the tests
MODULES = (
    "aiohttp", "jinja2", "matplotlib", "megatron.core", "numpy", "omegaconf", "psutil", "pyarrow", "pytest", "pytest_timeout",
    "safetensors", "tokenizers", "torch", "tqdm", "transformers", "yaml",
)  # fmt: skip
OPTIONAL = {
    "transformer_engine": "its layers, FP8 and FusedAdam are not tested",
    "vllm": "the sampler beside the trainer, and a whole run, are not tested",
}


def missing(modules=MODULES) -> list[str]:
    """Those of the modules that cannot be imported."""
    found = []
    for module in modules:
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package that it is part of
            there = False
        found += [] if there else [module]
    return found


def main() -> int:
    for module in missing(OPTIONAL):
        print(f"test-gpu: {sys.executable} lacks {module}: {OPTIONAL[module]}", file=sys.stderr)
    if names := missing():
        print(f"test-gpu: {sys.executable} lacks {', '.join(names)}: install them, or set PYTHON or PYTHONPATH", file=sys.stderr)
    return 2 if names else 0


if __name__ == "__main__":
    sys.exit(main())

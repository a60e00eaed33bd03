"""Says which modules the tests of this folder need and this Python does not have; exit code 2 if any."""

import importlib.util
import sys

MODULES = ("megatron.core", "numpy", "omegaconf", "pytest", "pytest_timeout", "safetensors", "torch", "transformers", "yaml")


def missing(modules: tuple[str, ...] = MODULES) -> list[str]:
    """Those of the modules that cannot be imported."""
    found = []
    for module in modules:
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package that it is part of
            there = False
        found += [] if there else [module]
    return found


if __name__ == "__main__" and (names := missing()):
    print(f"test-gpu: {sys.executable} lacks {', '.join(names)}: install them, or set PYTHON or PYTHONPATH", file=sys.stderr)
    sys.exit(2)

"""What a test of this folder cannot do without."""

import importlib.util

import pytest

from tests.gpu.cases import GPU, TE

needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
needs_te = pytest.mark.skipif(not TE, reason="no Transformer Engine on a GPU")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")

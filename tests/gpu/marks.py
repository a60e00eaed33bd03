"""What a test of this folder cannot do without."""

import importlib.util
import os

import pytest

from tests.gpu.cases import GPU, TE

needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
needs_te = pytest.mark.skipif(not TE, reason="no Transformer Engine on a GPU")
# what other tests see of it on a CPU, in more depth, need not be seen in every run of the suite
gpu_or_long = pytest.mark.skipif(not GPU and os.environ.get("MEGATRON_NFT_LONG") != "1", reason="no GPU, and MEGATRON_NFT_LONG is not 1")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")

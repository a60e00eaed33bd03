"""How far the built-in judges agree with corpus.jsonl. `python tests/unit/rewards/agreement.py` prints the table and every disagreement.

A row of the corpus: `answer`, which stands on the answer line and in the box of the response (or the whole `response`), the `gold`, the
`verdict` of a careful mathematician who has been told what docs/rewards.md says of units, percent and lists, and which judges differ from
it, and why. `endless`: the symbolic comparison would not come back from it.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_nft.rewards.answer_line import dapo
from megatron_nft.rewards.boxed import strict_box

CORPUS = Path(__file__).with_name("corpus.jsonl")
JUDGES = ("strict_box", "dapo", "math_verify")


def load() -> list[dict]:
    """The rows of the corpus."""
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def response_of(row: dict) -> str:
    """What the model is taken to have written."""
    return row["response"] if "response" in row else f"Answer: {row['answer']}\n\n\\boxed{{{row['answer']}}}"


def outcome(judge: str, row: dict) -> str:
    """The outcome of a judge's verdict. An endless row is "timed_out", as under the Judge's deadline, without being judged."""
    if judge == "math_verify":
        from megatron_nft.rewards.symbolic import math_verify  # imports SymPy

        return "timed_out" if row.get("endless") else math_verify(response_of(row), row["gold"]).outcome
    return {"strict_box": strict_box, "dapo": dapo}[judge](response_of(row), row["gold"]).outcome


def disagrees(verdict: str, row: dict) -> bool:
    """Whether an outcome has another score than the agreed verdict."""
    return (verdict == "right") != (row["verdict"] == "right")


def table(rows: list[dict], outcomes: dict[str, list[str]]) -> Iterator[str]:
    """Markdown: by category, how many pairs each judge decides as agreed, and how many wrong answers it takes for right."""
    yield "| category | pairs | " + " | ".join(JUDGES) + " | pairs that all three agree on |"
    yield "|---|---|" + "---|" * (len(JUDGES) + 1)
    categories = dict.fromkeys(row["category"] for row in rows)
    for category in [*categories, "all"]:
        own = [i for i, row in enumerate(rows) if category in (row["category"], "all")]
        cells = [_cell(own, rows, outcomes[judge]) for judge in JUDGES]
        alike = sum(len({outcomes[judge][i] == "right" for judge in JUDGES}) == 1 for i in own)
        yield f"| {category} | {len(own)} | " + " | ".join(cells) + f" | {alike} |"


def _cell(own: list[int], rows: list[dict], outcomes: list[str]) -> str:
    missed = Counter(rows[i]["verdict"] for i in own if disagrees(outcomes[i], rows[i]))
    agreed = str(len(own) - missed.total())
    return f"{agreed} ({missed['wrong']} too many)" if missed["wrong"] else agreed


def main() -> None:
    """Print the table, and what math_verify decides otherwise."""
    rows = load()
    outcomes = {judge: [outcome(judge, row) for row in rows] for judge in JUDGES}
    print(*table(rows, outcomes), sep="\n")
    for judge in sys.argv[1:] or ["math_verify"]:
        print(f"\n{judge}, against the agreed verdict:\n\n| answer | gold | agreed | {judge} | why |\n|---|---|---|---|---|")
        for row, said in zip(rows, outcomes[judge]):
            if disagrees(said, row):
                shown = " ".join((row.get("answer") or row["response"]).split())
                why = row["differs"].get(judge, "not in the corpus")
                print(f"| `{shown}` | `{row['gold']}` | {row['verdict']} | {said} | {why} |")


if __name__ == "__main__":
    main()

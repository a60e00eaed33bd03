"""GSM8K as the arms of this directory use it: train.jsonl and heldout.jsonl out of its training problems, test.jsonl.

    python examples/gsm8k_smollm2/prepare.py [OUT_DIR] [--data DIR]

From the hub (openai/gsm8k, through `datasets`), or from a folder with gsm8k_train.jsonl and gsm8k_test.jsonl, which have the columns
problem, answer and solution: --data, or the environment's MEGATRON_NFT_GSM8K. A solution keeps its wording and its last line, "#### 72";
the annotations for a calculator, <<48/2=24>>, come off, and so do the commas of its result.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from megatron_nft.config import BENCHMARKS, DatasetConfig
from megatron_nft.errors import UserError
from megatron_nft.files import write_whole
from megatron_nft.prompts import load_rows

OUT = Path(__file__).parent / "data"
HELD_OUT = 500  # training problems that nothing is trained on: the validation while an arm runs
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def worked(solution: str, gold: str) -> str:
    """A solution as the model is to write it: without annotations, spaces at the ends of lines and empty lines, "#### gold" at its end.

    >>> worked("48/2 = <<48/2=24>>24 clips. \\n#### 1,024", "1024")
    '48/2 = 24 clips.\\n#### 1024'
    """
    text = _ANNOTATION.sub("", solution.rpartition("####")[0])
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join([*lines, f"#### {gold}"])


def rows(benchmark: str, data: str | None) -> list[dict[str, str]]:
    """A split's problems as {id, problem, answer, solution}. data: the folder of its file; None: the hub. Raises UserError for what
    cannot be read."""
    path = str(Path(data) / BENCHMARKS[benchmark].file) if data else None
    made = []
    for number, row in enumerate(load_rows(DatasetConfig(benchmark=benchmark, path=path))):
        if not row.get("solution"):
            raise UserError(f"row {number} of {path or BENCHMARKS[benchmark].path} has no solution", "use GSM8K as it was published")
        solution = worked(row["solution"], row["answer"])
        made.append({"id": f"{benchmark}-{number}", "problem": row["question"], "answer": row["answer"], "solution": solution})
    return made


def write(out: Path, data: str | None, held_out: int = HELD_OUT) -> dict[str, int]:
    """Write the three files; how many rows each has. The last `held_out` training problems are the held-out ones."""
    training = rows("gsm8k_train", data)
    if not 0 < held_out < len(training):
        raise UserError(f"{held_out} of {len(training)} training problems cannot be held out", "keep some to train on, and some not")
    files = {"train": training[:-held_out], "heldout": training[-held_out:], "test": rows("gsm8k", data)}
    for name, of in files.items():
        write_whole(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of))
    return {name: len(of) for name, of in files.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--data", default=os.environ.get("MEGATRON_NFT_GSM8K"), help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl")
    given = parser.parse_args()
    try:
        for name, count in write(given.out, given.data).items():
            print(f"{given.out / name}.jsonl: {count} problems")
    except UserError as error:
        print(f"prepare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

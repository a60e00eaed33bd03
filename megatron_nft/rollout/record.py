"""The record of a step: rollouts/step_N.parquet, one row for each answer, enough to train from again; and beside it
coefficients_N.parquet, how hard the updates pushed the tokens of a few of them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_nft.files import write_parquet
from megatron_nft.trajectories import Group, Prompt, Pushes, Response, Verdict


def rollout_path(run_dir: str | Path, step: int, engine: int = 0, engines: int = 1) -> Path:
    """Where a step's answers are kept: rollouts/step_N.parquet, and step_N-E.parquet where several engines each write their own."""
    return Path(run_dir) / "rollouts" / (f"step_{step}.parquet" if engines == 1 else f"step_{step}-{engine}.parquet")


def write_rollouts(path: str | Path, step: int, groups: list[Group]) -> None:
    """Write groups as parquet, complete or not at all (a temporary name, then a rename)."""
    rows = [_row(step, group, sample, response) for group in groups for sample, response in enumerate(group.responses)]
    write_parquet(Path(path), rows, _schema())


def write_carried(directory: Path, groups: list[Group], engine: int = 0) -> list[Path]:
    """Write an engine's groups that go on after a checkpoint into its directory; the files, none where there is no group."""
    if not groups:
        return []
    path = directory / f"carried_{engine}.parquet"
    write_rollouts(path, 0, groups)
    return [path]


def read_carried(directory: Path, index: int = 0, count: int = 1) -> list[Group]:
    """What the engines with the numbers `index`, `index` + `count` ... wrote into a checkpoint."""
    files = sorted((int(path.stem.rpartition("_")[2]), path) for path in directory.glob("carried_*.parquet"))
    return [group for engine, path in files if engine % count == index for group in read_rollouts(path)]


def write_coefficients(run_dir: str | Path, step: int, pushes: list[Pushes]) -> None:
    """Write R and c of the answers that were watched as rollouts/coefficients_N.parquet. A row's `position` and `sample` are those of its
    answer in step_N.parquet; null is a token that is not trained on."""
    rows = [{"step": step, **{name: getattr(one, field) for name, field in _PUSHES.items()}} for one in pushes]
    write_parquet(_coefficients_path(run_dir, step), rows, _coefficients_schema())


def read_coefficients(run_dir: str | Path, step: int) -> list[Pushes]:
    """What write_coefficients wrote; empty where it wrote nothing."""
    import pyarrow.parquet

    path = _coefficients_path(run_dir, step)
    rows = pyarrow.parquet.read_table(path, schema=_coefficients_schema()).to_pylist() if path.is_file() else []
    return [Pushes(**{field: row[name] for name, field in _PUSHES.items()}) for row in rows]


_PUSHES = {"position": "position", "sample": "sample", "R": "ratios", "c": "coefficients"}  # column: field


def _coefficients_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"coefficients_{step}.parquet"


def _coefficients_schema():
    import pyarrow as pa

    integer, reals = pa.int64(), pa.list_(pa.float32())
    return pa.schema({"step": integer, "position": integer, "sample": integer, "R": reals, "c": reals})


def read_rollouts(path: str | Path, index: int = 0, count: int = 1) -> list[Group]:
    """The groups that write_rollouts wrote, in the same order and to the last bit; of every `count` of them that with the number `index`.
    Columns that an older file lacks are null."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, schema=_schema())
    group = np.cumsum(table["sample"].to_numpy() == 0) - 1  # before any row is made a Python object
    return list(_groups(table.filter(group % count == index).to_pylist()))


def read_first_rows(path: str | Path, count: int) -> list[dict]:
    """The first answers of a file, by column, without reading the others."""
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=count)
    return next((batch.to_pylist() for batch in batches), [])


def _groups(rows: list[dict]) -> Iterator[Group]:
    """A group begins wherever the sample number is 0: a prompt may come twice in a step."""
    starts = itertools.accumulate(row["sample"] == 0 for row in rows)
    for _, members in itertools.groupby(zip(starts, rows, strict=True), key=lambda pair: pair[0]):
        own = [row for _, row in members]
        first = own[0]
        prompt = Prompt(first["prompt_id"], first["question"], first["answer"], tuple(first["prompt_tokens"]), first["source"],
                        tuple(first["alternatives"] or ()), first["reward"])  # fmt: skip
        yield Group(prompt, [_response(row) for row in own], first["position"])


def _row(step: int, group: Group, sample: int, response: Response) -> dict:
    prompt, verdict = group.prompt, response.verdict
    return {
        "step": step,
        "position": group.position,
        "prompt_id": prompt.id,
        "source": prompt.source,
        "question": prompt.question,
        "answer": prompt.answer,
        "alternatives": prompt.alternatives,
        "reward": prompt.reward,
        "sample": sample,
        "response": response.text,
        "verdict": None if verdict is None else verdict.score,
        "outcome": None if verdict is None else verdict.outcome,
        "found": None if verdict is None else verdict.found,
        "penalty": response.penalty,
        "finish_reason": response.finish_reason,
        "weight_version": response.weight_version,
        "prompt_tokens": prompt.token_ids,
        "tokens": response.token_ids,
        "logprobs": response.logprobs,
        "loss_mask": response.loss_mask,
        "later_versions": None if response.later_versions is None else [list(pair) for pair in response.later_versions],
    }


def _response(row: dict) -> Response:
    verdict = None if row["outcome"] is None else Verdict(row["verdict"], row["outcome"], row["found"])
    later = None if row["later_versions"] is None else [tuple(pair) for pair in row["later_versions"]]
    return Response(row["tokens"], row["logprobs"], row["finish_reason"], row["weight_version"], row["response"],
                    row["loss_mask"], verdict, row["penalty"], later)  # fmt: skip


def _schema():
    import pyarrow as pa

    text, integer, real, tokens = pa.string(), pa.int64(), pa.float64(), pa.list_(pa.int32())
    return pa.schema({
        "step": integer, "position": integer, "prompt_id": text, "source": text, "question": text, "answer": text,
        "alternatives": pa.list_(text), "reward": text, "sample": integer, "response": text,
        "verdict": real, "outcome": text, "found": text, "penalty": real, "finish_reason": text, "weight_version": integer,
        "prompt_tokens": tokens, "tokens": tokens, "logprobs": pa.list_(pa.float32()), "loss_mask": pa.list_(pa.int8()),
        "later_versions": pa.list_(pa.list_(integer)),
    })  # fmt: skip

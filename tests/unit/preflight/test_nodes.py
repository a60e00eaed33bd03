"""What two nodes must have alike, and what is said of the one that differs."""

import pytest

from megatron_nft.config import load
from megatron_nft.errors import UserError
from megatron_nft.preflight import nodes
from megatron_nft.preflight.together import Place, leads
from tests.support import ROOT

PLACES = [Place(0, "a"), Place(1, "a"), Place(2, "b"), Place(3, "b")]


def of(*values) -> dict[Place, object]:
    return dict(zip(PLACES, values, strict=True))


def installed(**changes: str) -> dict[str, str]:
    return {"python": "3.12.3", "torch": "2.13", "megatron-core": "0.19.2", "vllm": "0.32", "transformer-engine": "2.9",
            "transformers": "5.1"} | changes  # fmt: skip


def test_versions_are_read_from_what_is_installed():
    import torch

    found = nodes.versions()
    assert found["torch"] == torch.__version__ and found["megatron-core"] and found["vllm"] and found["python"].count(".") == 2


def test_the_rank_whose_versions_differ_is_named():
    nodes.check_versions(of(*[installed()] * 4))
    nodes.check_versions(of(*[installed(**{"transformer-engine": ""})] * 4))  # without a GPU there is none
    with pytest.raises(UserError, match=r"b \(rank 2\): torch is 2.12, on other ranks 2.13: use one environment"):
        nodes.check_versions(of(installed(), installed(), installed(torch="2.12"), installed()))
    with pytest.raises(UserError, match=r"a \(rank 1\): transformer-engine is not installed, on other ranks 2.9"):
        nodes.check_versions(of(installed(), installed(**{"transformer-engine": ""}), installed(), installed()))
    with pytest.raises(UserError, match=r"a \(rank 0\): vllm is not installed: install it there"):
        nodes.check_versions(of(*[installed(vllm="")] * 4))


def test_gpus_of_each_node():
    two, one = ["H100", "H100"], ["H100"]
    nodes.check_gpus(of(two, two, two, two), 2)
    nodes.check_gpus(of([], [], [], []), 0)
    with pytest.raises(UserError, match=r"b \(rank 2\): 1 GPUs are seen, 2 were asked for: .*--gpus-per-node=2.*--exclude=b"):
        nodes.check_gpus(of(two, two, one, one), 2)
    with pytest.raises(UserError, match=r"a \(rank 0\): 2 ranks share 1 GPUs"):
        nodes.check_gpus(of(one, one, two, two), 0)
    with pytest.raises(UserError, match="of several kinds: H100, H200"):
        nodes.check_gpus(of(two, two, ["H200"] * 2, ["H200"] * 2), 2)


def test_files_of_each_node(tmp_path):
    for name, text in {"a": "same", "b": "same", "c": "else", "d": "longer"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    digests = {name: nodes.digest(tmp_path / name) for name in "abcde"}
    assert digests["a"] == digests["b"] and digests["e"] == "" and len(set(digests.values())) == 4

    def check(one: str, other: str) -> None:
        nodes.check_files({PLACES[0]: {"model.path": digests[one]}, PLACES[2]: {"model.path": digests[other]}}, {"model.path": "/m"})

    check("a", "b")
    check("e", "e")  # told of by those who read it
    with pytest.raises(UserError, match=r"b \(rank 2\): model.path /m is missing, and is there on a: put it"):
        check("a", "e")
    with pytest.raises(UserError, match=r"a \(rank 0\): model.path /m is missing, and is there on b"):
        check("e", "a")
    with pytest.raises(UserError, match=r"b \(rank 2\): model.path /m holds something else than on a"):
        check("a", "c")


def test_a_large_file_that_differs_at_its_end_is_another(tmp_path):
    """As two checkpoints of one model do: the same header, the same size."""
    for name in "ab":
        (tmp_path / name).write_bytes(b"\0" * 3 * nodes.PIECE + name.encode())
    assert nodes.digest(tmp_path / "a") != nodes.digest(tmp_path / "b")


def test_names_on_the_hub_are_no_paths():
    settings = load(ROOT / "examples/arithmetic/nft.yaml", ["data.train=[{benchmark: dapo_math_17k}, {path: x.parquet}, {path: /no/such}]"])
    assert nodes.paths(settings) == {
        "model.path": "examples/arithmetic/model",
        "data.train.1.path": "x.parquet",
        "data.train.2.path": "/no/such",
        "evaluation.sets.0.path": "examples/arithmetic/heldout.jsonl",
    }


def test_the_first_rank_of_a_node_looks_for_it():
    assert [place.rank for place in PLACES if leads(PLACES, place)] == [0, 2]

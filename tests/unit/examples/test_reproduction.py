"""The reproduction's arms load, its findings follow their rule, and its table and page are made from runs."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_nft.config import load, save
from tests.support import ROOT, load_example

HERE = ROOT / "examples" / "reproduction"
arms, findings, summary = (load_example(f"reproduction/{name}.py") for name in ("arms", "findings", "summary"))


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_loads(name, tmp_path):
    config = load(HERE / "common.yaml", arms.Run(name, 2, tmp_path).overrides)
    assert config.seed == 2 and config.run_dir.startswith(str(tmp_path)) and config.train.sampled_tokens == 700_000
    plain = name.removesuffix(", strong base")
    default = name not in arms.ABLATIONS
    assert config.objective.name == ({"Dr.GRPO": "dr_grpo"}.get(plain, plain.lower()) if default else "nft")


def test_each_ablation_changes_one_knob(tmp_path):
    nft = load(HERE / "common.yaml", arms.Run("NFT", 1, tmp_path).overrides).objective
    for name in arms.ABLATIONS:
        key, value = name.split()
        changed = load(HERE / "common.yaml", arms.Run(name, 1, tmp_path).overrides).objective
        assert {k: v for k, v in vars(changed).items() if v != getattr(nft, k)} == {key: type(getattr(nft, key))(float(value))}


def test_every_run_has_a_directory_of_its_own(tmp_path):
    assert len({arms.Run(name, seed, tmp_path).directory for name in arms.ARMS for seed in arms.SEEDS}) == 51


@dataclass
class Made:
    sampled: float
    entropy: float = 0.0


def made(**arms_of_seeds: list[float]) -> dict:
    return {name: {seed: Made(value) for seed, value in enumerate(values)} for name, values in arms_of_seeds.items()}


@pytest.mark.parametrize(
    "nft, rft, said",
    [
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.62], "holds"), ([0.4, 0.5, 0.62], [0.5, 0.6, 0.7], "the opposite"),
        ([0.5, 0.6, 0.7], [0.4, 0.65, 0.6], "not told apart"), ([0.9], [0.1], "not told apart"),
    ],
)  # fmt: skip
def test_a_difference_is_there_by_one_rule(nft, rft, said):
    """The 95 % interval of the mean leaves out 0; one seed tells nothing."""
    assert f"**NFT is above RFT**: {said}." in findings.findings(made(NFT=nft, RFT=rft))[0]


def test_about_equal_and_entropy():
    results = made(NFT=[0.500, 0.502, 0.501], DAPO=[0.501, 0.501, 0.500], RFT=[0.1, 0.2, 0.1])
    for seed in range(3):
        results["RFT"][seed].entropy, results["NFT"][seed].entropy = -0.3 - seed / 100, (0.1, -0.2, 0.0)[seed]
    lines = "\n".join(findings.findings(results))
    assert "NFT is about equal to DAPO (within 2 points, its interval included)**: holds" in lines
    assert "**: not settled" in findings.findings(made(NFT=[0.5], DAPO=[0.5]))[0]  # one seed tells nothing
    assert "**entropy falls under RFT**: holds" in lines and "**entropy does not fall under NFT**: in 2 of 3 seeds" in lines
    assert "eps near 0" not in lines  # no such runs


def fake_run(run, sampled: list[float], entropies: list[float]) -> None:
    run.directory.mkdir(parents=True)
    rows = [{"step": 0, "validation/heldout/greedy": 0.2, "validation/heldout/avg@4": 0.1}]
    for step, entropy in enumerate(entropies, 1):
        rows.append({"step": step, "tokens": 1000, "train/entropy": entropy, "train/updates": 4})
    for row, value in zip(rows[-len(sampled) :], sampled, strict=True):
        row |= {"validation/heldout/greedy": value + 0.1, "validation/heldout/avg@4": value}
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(load(HERE / "common.yaml", run.overrides), run.directory / "config.yaml")
    (run.directory / "report.html").write_text("done")


@pytest.mark.slow
def test_the_page_the_table_and_the_curves(tmp_path, capsys):
    """Means of the last two validations, entropy of the last three steps against the first three; incomplete runs are left out."""
    names = ("NFT", "RFT", "NFT, strong base", "RFT, strong base", "eps 0.1")
    runs = [arms.Run(name, seed, tmp_path / "runs") for name in names for seed in (1, 2)]
    for i, run in enumerate(runs[:-1]):
        fake_run(run, [0.3 + i / 100, 0.5 + i / 100], [0.2, 0.2, 0.2, 0.1, 0.1, 0.1])
    docs = tmp_path / "docs"
    docs.mkdir()
    summary.write(runs, tmp_path / "runs", docs)
    page = (docs / "reproduction.md").read_text()
    assert "| weak base |  | 20.0% | 10.0% |  |  |" in page and "| NFT | 2 | 50.5 ± 0.7 | 40.5 ± 0.7 | -50.0 ± 0.0 | 24 |" in page
    assert "| strong base |  | 20.0% | 10.0% |  |  |" in page and "| NFT, strong base | 2 | 54.5 ± 0.7 |" in page
    assert "| eps 0.1 | 1 | 58.0 | 48.0 | -50.0 | 24 |" in page and "6,000" in page
    assert "From the strong base: **NFT is above RFT**: the opposite." in page
    assert (docs / "reproduction.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "runs" / "report.html").read_text()
    assert "data:image/png;base64," in html and "nft-seed1/report.html" in html and "<th>arm</th>" in html
    assert "NFT is above RFT" in capsys.readouterr().out


def test_a_run_made_with_other_settings_is_not_mixed_in(tmp_path):
    run, other = (arms.Run("NFT", 1, tmp_path, more) for more in ((), ("optimizer.lr=1e-3",)))
    fake_run(run, [0.3], [0.2])
    assert run.complete
    with pytest.raises(SystemExit, match="made with other settings"):
        assert other.complete


def test_nothing_to_summarise_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no run below"):
        summary.write([arms.Run("NFT", 1, tmp_path)], tmp_path, Path(tmp_path))

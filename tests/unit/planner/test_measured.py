"""A GPU's measured efficiencies in place of the published ones: used, told of, and refused where they are none."""

import json

import pytest

from megatron_nft import config
from megatron_nft.cli import main
from megatron_nft.planner import hardware, picture, tables
from megatron_nft.planner.cluster import Cluster
from megatron_nft.planner.measured import LIMITS
from megatron_nft.planner.plan import plan

FIGURES = {"matrix": 0.5, "matrix_fp8": 0.45, "attention": 0.6, "attention_backward": 0.5, "half_rate": 700, "memory": 0.85, "decode": 0.7,
           "nvlink": 0.7, "network": 0.6, "host": 0.9, "launch": 4e-6}  # fmt: skip
ENTRY = {"gpu": "H100", "device": "NVIDIA H100 80GB HBM3", "date": "2030-01-02 03:04 UTC", "command": "python efficiency.py"}


@pytest.fixture
def entry(tmp_path):
    """The path of a made-up measurement; changes to it."""

    def make(**changes) -> str:
        path = tmp_path / "measured.json"
        path.write_text(json.dumps(ENTRY | {"figures": FIGURES} | changes))
        return str(path)

    return make


def test_figures_are_fields_of_what_a_gpu_achieves():
    assert set(FIGURES) == set(LIMITS) == set(hardware.Achieved.__dataclass_fields__) - {"source"}


def test_measured_figures_replace_published_ones_and_the_data_sheet_stays(file, entry):
    published = Cluster.of(config.load(file)).gpu
    gpu = Cluster.of(config.load(file, [f"plan.measured={entry()}"])).gpu
    assert all(getattr(gpu.achieved, name) == value for name, value in FIGURES.items())
    assert gpu.achieved.source == "measured on NVIDIA H100 80GB HBM3 on 2030-01-02"
    assert (gpu.bf16, gpu.bandwidth, gpu.memory) == (published.bf16, published.bandwidth, published.memory)
    assert published.achieved.source == hardware.PUBLISHED and published.achieved.matrix == 0.66


def test_what_was_not_measured_stays_published_and_is_named(file, entry):
    gpu = Cluster.of(config.load(file, [f"plan.measured={entry(figures=FIGURES | {'nvlink': None, 'network': None})}"])).gpu
    assert gpu.achieved.nvlink == 0.78 and gpu.achieved.matrix == 0.5
    assert gpu.achieved.source.endswith("on 2030-01-02; published (docs/planner.md): nvlink, network")


@pytest.mark.slow
def test_a_plan_goes_by_them_and_every_output_says_so(file, entry, tmp_path):
    own, usual = plan(config.load(file, [f"plan.measured={entry()}"])), plan(config.load(file))
    # half of the peak in place of 0.66 of it, in the trainers' products
    assert own.times.parts["train"]["matrix products"] > 1.2 * usual.times.parts["train"]["matrix products"]
    said = "measured on NVIDIA H100 80GB HBM3 on 2030-01-02"
    assert said in tables.text(own) and said in tables.short(own) and said in picture.page(own)
    assert said in tables.comparison({"a": own, "b": usual})
    assert own.as_dict()["achieved"] == said
    assert picture._figure(own).get_suptitle().endswith(said)
    for text in (tables.text(usual), tables.short(usual), picture.page(usual), usual.as_dict()["achieved"]):
        assert "published (docs/planner.md)" in text and said not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "H200"}, "was measured on H200, and plan.gpu is H100: set plan.gpu=H200"),
        ({"gpu": None, "device": "CPU (Xeon)"}, "was measured on CPU (Xeon), which is no GPU"),
        ({"tiny": True}, "was made with --tiny"),
        ({"figures": {"matrix": 1.06}}, "says that matrix is 1.06, which cannot be: it is above 0, up to 1.05"),
        ({"figures": {"memory": 0}}, "says that memory is 0, which"),
        ({"figures": {"host": -0.1}}, "says that host is -0.1"),
        ({"figures": {"launch": 0.5}}, "says that launch is 0.5, which cannot be: it is above 0, up to 0.001"),
        ({"figures": {"matrix": "fast"}}, "says that matrix is 'fast'"),
        ({"figures": {"matrix": True}}, "says that matrix is True"),
        ({"figures": {"matrix": float("nan")}}, "says that matrix is nan"),
        ({"figures": {"matrix": float("inf")}}, "says that matrix is inf"),
        ({"figures": {"matrix": 10**400}}, "says that matrix is 1000"),
        ({"figures": {"speed": 1}}, "has a figure 'speed'"),
        ({"figures": {"matrix": None}}, "has no figure"),
        ({"figures": [1]}, "is no measurement"),
        ({"date": None}, "is no measurement"),
    ],
)
def test_what_is_no_measurement_of_the_gpu_is_one_line(changes, said, file, entry, capsys):
    assert main(["plan", str(file), f"plan.measured={entry(**changes)}"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


DAMAGED = [("{", "is damaged ("), ("\xff", "is damaged ("), ("[" * 100_000, "is damaged ("), ("[]", "is no measurement")]


@pytest.mark.parametrize(("text", "said"), DAMAGED, ids=range(4))
def test_damaged_files_are_one_line(text, said, file, tmp_path, capsys):
    path = tmp_path / "damaged.json"
    path.write_bytes(text.encode("latin-1"))
    assert main(["plan", str(file), f"plan.measured={path}"]) == 2
    assert said in capsys.readouterr().err
    assert main(["plan", str(file), f"plan.measured={tmp_path}/nowhere.json"]) == 2
    assert "nowhere.json cannot be read (No such file or directory)" in capsys.readouterr().err

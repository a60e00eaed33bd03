"""Presets, the order of the layers, and what naming an objective does to its settings."""

import pytest

from megatron_nft.config import (
    ObjectiveConfig,
    SetSampling,
    describe,
    load,
    load_with_sources,
    max_model_len,
    preset_names,
    samplings,
    save,
)
from megatron_nft.config.objective import OWN_SETTINGS, PUBLISHED
from megatron_nft.errors import UserError


@pytest.fixture
def file(tmp_path):
    def file(text: str = ""):
        path = tmp_path / "config.yaml"
        path.write_text("run_dir: runs/a\nmodel: {path: models/m}\n" + text)
        return path

    return file


# of the published runs: reduction_constant, lr, prompts x answers a step, prompts an update, longest answer, penalty's buffer
RUNS = {
    "nft-7b": ("nft", 32000.0, 512, 16, 32, 3584, None),
    "nft-32b": ("nft", 16000.0, 512, 16, 32, 14336, None),
    "rft-7b": ("rft", 32000.0, 512, 16, 32, 3584, None),
    "rft-32b": ("rft", 16000.0, 512, 16, 32, 14336, None),
    "grpo-7b": ("grpo", 1000.0, 512, 16, 32, 3584, None),
    "grpo-32b": ("grpo", 1000.0, 512, 16, 32, 14336, None),
    "dr-grpo-7b": ("dr_grpo", 32000.0, 512, 16, 32, 3584, None),
    "dapo-7b": ("dapo", 1000.0, 512, 16, 32, 3584, None),
    "dapo-32b": ("dapo", 1000.0, 512, 16, 32, 14336, 4096),
    "dapo": ("dapo", 1000.0, 512, 16, 32, 20480, 4096),
    "grpo": ("grpo", 1000.0, 16, 64, 16, 1024, None),
    "dr-grpo": ("dr_grpo", 384000.0, 128, 8, 16, 3000, None),
    "gspo": ("gspo", 1000.0, 512, 16, 128, 14336, None),
    "cispo": ("cispo", 1000.0, 512, 16, 32, 20480, 4096),
}


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.startswith(("evaluation-", "fp8-"))])
def test_a_preset_is_the_published_run(file, name):
    config = load(file(f"preset: {name}\n"))
    rollout, settings = config.rollout, config.objective
    assert RUNS[name] == (settings.name, settings.reduction_constant, rollout.prompts_per_step, rollout.n, config.train.prompts_per_update,
                          rollout.max_tokens, config.reward.overlong_buffer)  # fmt: skip
    assert {key: getattr(settings, key) for key in PUBLISHED[settings.name]} == PUBLISHED[settings.name]
    assert config.optimizer.lr == 1e-6 and config.reward.truncated == "wrong"
    longest = config.data.max_prompt_length + rollout.max_tokens
    assert config.train.tokens_per_micro_batch >= longest


def test_the_authors_settings_in_full(file):
    config = load(file("preset: nft-32b\n"))
    assert config.objective == ObjectiveConfig("nft", 1.0, 1, 1.0, ratio="token", reduction="constant", reduction_constant=16000.0)
    optimizer = config.optimizer
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay, optimizer.clip_grad) == (0.9, 0.999, 0.1, 1.0)
    assert optimizer.lr_warmup_iters == 160 and config.train.steps == 320
    assert (config.evaluation.k, config.evaluation.temperature, config.evaluation.top_p) == (32, 0.6, 0.7)
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.order) == (1.0, 1.0, "prompt")


def test_sampling_in_fp8_goes_over_a_run_and_changes_nothing_else(file):
    for name in ("nft-32b", "rft-32b", "dapo-32b", "grpo-32b"):
        plain, fp8 = (load(file(f"preset: {presets}\n")) for presets in (name, f"[{name}, fp8-rollout]"))
        assert (fp8.rollout.quantization, fp8.rollout.kv_cache_dtype, fp8.objective.correction.method) == ("fp8", "fp8", "truncate")
        fp8.rollout.quantization, fp8.rollout.kv_cache_dtype = plain.rollout.quantization, plain.rollout.kv_cache_dtype
        fp8.rollout.max_num_seqs, fp8.objective.correction = plain.rollout.max_num_seqs, plain.objective.correction
        fp8.preset = plain.preset
        assert fp8 == plain


@pytest.mark.parametrize(("name", "temperature", "tokens"), [("evaluation-7b", 1.0, 3584), ("evaluation-32b", 0.6, 14336)])
def test_the_papers_benchmarks(file, name, temperature, tokens):
    """avg@32 of three and avg@1 of three, top_p 0.7."""
    config = load(file(f"preset: [nft-7b, {name}]\n"))
    expected = {"aime24": 32, "aime25": 32, "amc23": 32, "math500": 1, "olympiadbench": 1, "minerva": 1}
    assert samplings(config) == {of_set: SetSampling(False, k, temperature, 0.7, tokens) for of_set, k in expected.items()}
    assert max_model_len(config) == tokens + (512 if name == "evaluation-7b" else 2048)


@pytest.mark.parametrize("where", ["file", "command line"])
def test_a_preset_with_a_typo_names_the_nearest(file, where):
    with pytest.raises(UserError) as caught:
        load(file("preset: nft-7bb\n" if where == "file" else ""), [] if where == "file" else ["preset=nft-7bb"])
    assert str(caught.value) == "there is no preset 'nft-7bb': did you mean nft-7b?"
    with pytest.raises(UserError, match="use one of .*dapo-32b"):
        load(file(), ["preset=[nft-7b, zzz]"])


def test_a_preset_may_be_a_file_beside(file, tmp_path, monkeypatch):
    """Relative to the file that names it, itself on a preset; only published ones stay named in what is saved."""
    (tmp_path / "common.yaml").write_text("preset: nft-7b\nrollout: {n: 4, top_p: 0.9}\n")
    path = file("preset: [common.yaml]\nrollout: {n: 5}\n")
    config, sources = load_with_sources(path)
    assert (config.rollout.n, config.rollout.top_p, config.rollout.max_tokens) == (5, 0.9, 3584)
    assert (sources["rollout.top_p"], sources["rollout.max_tokens"]) == ("preset common.yaml", "preset nft-7b")
    assert config.preset == ["nft-7b"]
    save(config, tmp_path / "saved.yaml")
    (tmp_path / "common.yaml").rename(tmp_path / "elsewhere.yaml")
    assert load(tmp_path / "saved.yaml") == config
    with pytest.raises(UserError, match=r"no preset at .*common.yaml: mend the path"):
        load(path)
    monkeypatch.chdir(tmp_path)
    assert load(path, ["preset=elsewhere.yaml"]).rollout.top_p == 0.9  # from the command line: relative to where one is


def test_the_order_of_the_layers(file):
    """defaults < the file's preset < the file < the command line's preset < the command line"""
    path = file("preset: nft-7b\nrollout: {n: 4, max_tokens: 100}\n")
    config, sources = load_with_sources(path, ["rollout.temperature=0.9"])
    assert (config.rollout.prompts_per_step, config.rollout.n, config.rollout.temperature) == (512, 4, 0.9)
    assert sources["rollout.prompts_per_step"] == "preset nft-7b" and sources["rollout.n"] == str(path)
    assert sources["rollout.temperature"] == "command line" and "rollout.save" not in sources
    config = load(path, ["preset=grpo", "rollout.max_tokens=99"])
    assert (config.rollout.n, config.rollout.max_tokens, config.preset) == (64, 99, ["grpo"])
    assert config.rollout.tensor_parallel_size == 1  # the file's preset gave way to the command line's
    config = load(path, ["preset=[nft-7b, dapo-32b]"])
    assert config.objective.name == "dapo" and config.rollout.max_tokens == 14336


def test_another_objective_takes_its_own_settings(file):
    """One setting chooses the loss as its paper has it; what the layers below said of another loss does not carry over."""
    path = file("objective: {name: nft, normalize: 0, eps: 0.5, reduction: token-mean, correction: {method: truncate}}\n")
    assert load(path).objective.eps == 0.5
    for name, published in PUBLISHED.items():
        if name == "nft":
            continue
        level = "token" if published["ratio"] == "token" else "sequence"
        found = load(path, [f"objective.correction.level={level}", f"objective.name={name}"]).objective
        assert {key: getattr(found, key) for key in OWN_SETTINGS if key != "reduction_constant"} == {
            key: published.get(key) for key in OWN_SETTINGS if key != "reduction_constant"
        }
        assert found.correction.method == "truncate"  # it is of the sampler, not of the loss
    assert load(path, ["objective.eps=0.25", "objective.name=nft"]).objective.normalize == 0  # the same objective: all stays
    assert load(path, ["objective.clip_ratio_high=0.3", "objective.name=dapo"]).objective.clip_ratio_high == 0.3  # in any order


def test_the_authors_spelling_of_dapo(file):
    found = load(file("objective: {normalize: 0, eps: 0.5}\n"), ["objective.neg_weight=-1"]).objective
    assert found == ObjectiveConfig("dapo")


def test_the_authors_spelling_is_told_and_explicit_settings_stay(file):
    config, sources = load_with_sources(file("objective: {normalize: 1}\n"), ["objective.neg_weight=-1", "objective.clip_ratio_high=0.3"])
    assert (config.objective.clip_ratio_high, config.objective.normalize) == (0.3, 2)
    assert "neg_weight -1" in sources["objective.name"] and "objective.normalize" not in sources


def test_a_mapping_sets_a_section(file):
    config, sources = load_with_sources(file("objective: {eps: 0.5}\n"), ["objective={name: dapo, correction: {method: truncate}}"])
    assert config.objective.name == "dapo" and config.objective.correction.method == "truncate"
    assert "correction.method" in describe(config, sources)


@pytest.mark.parametrize("value", ["3", "true", "0", "{a: 1}", "[nft-7b, 3]"])
def test_a_preset_that_is_no_name(file, value):
    with pytest.raises(UserError, match="preset is"):
        load(file(), [f"preset={value}"])
    with pytest.raises(UserError, match="preset is"):
        load(file(f"preset: {value}\n"))


@pytest.mark.parametrize("override", ["=3", ".name=3", "objective.=3"])
def test_an_override_without_a_key(file, override):
    with pytest.raises(UserError, match="cannot read the override"):
        load(file(), [override])


def test_the_constant_divides_by_nothing_with_the_sequence_ratio(file):
    assert load(file(), ["objective.ratio=sequence"]).objective.reduction_constant == 1.0
    assert load(file()).objective.reduction_constant == 1000.0


def test_describe_says_what_a_preset_resolved_to(file):
    path = file("preset: dapo-32b\n")
    lines = describe(*load_with_sources(path, ["rollout.n=8"])).splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines[:-1]}
    assert rows["objective.name"] == ["dapo", "preset dapo-32b"]
    assert rows["objective.clip_ratio_high"] == ["0.28", "dapo as published"]
    assert rows["reward.overlong_buffer"] == ["4096", "preset dapo-32b"]
    assert rows["rollout.n"] == ["8", "command line"] and rows["run_dir"] == ["runs/a", str(path)]
    assert "objective.reduction_constant" not in rows  # dapo takes the mean over tokens
    other = describe(*load_with_sources(file("preset: nft-7b\n"), ["objective.name=rft"])).splitlines()
    [line] = [line for line in other if line.startswith("objective.reduction_constant")]
    assert line.split()[1] == "1000.0"  # 32,000 was of another objective, and the table says so


def test_what_the_papers_set():
    """Written out a second time, from the papers: a slip of a digit in the table would train something else in silence."""
    clips = {name: (p["clip_ratio_low"], p["clip_ratio_high"]) for name, p in PUBLISHED.items() if "clip_ratio_low" in p}
    assert clips == {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    by_deviation = {name for name, p in PUBLISHED.items() if p["normalize"] == 2}
    assert by_deviation == {"grpo", "dapo", "gspo", "cispo"}
    assert {name for name, p in PUBLISHED.items() if p.get("signed_reward")} == {"dapo", "cispo"}
    assert [PUBLISHED[name]["reduction"] for name in ("nft", "rft", "grpo", "dr_grpo", "dapo", "gspo", "cispo")] == [
        "constant", "constant", "sequence-mean", "constant", "token-mean", "sequence-mean", "token-mean"
    ]  # fmt: skip

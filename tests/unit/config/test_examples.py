"""The published runs as examples: complete, the paper's numbers, and laid out so that Megatron-Core and vLLM take them."""

from functools import cache
from types import SimpleNamespace

import pytest

from megatron_nft import policy, saves
from megatron_nft.config import Config, check, load, max_model_len, samplings
from megatron_nft.flops import attention_cost
from megatron_nft.planner.cluster import Cluster, Layout
from megatron_nft.policy import checks, model
from megatron_nft.rollout.engine import check_world
from tests.support import ROOT

# config.json of the two models
COMMON = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_act": "silu",
          "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
MODELS = {
    "qwen2.5_math_7b": COMMON | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 4096, "rope_theta": 10000, "rms_norm_eps": 1e-6},
    "qwen2.5_32b": COMMON | {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5},
}  # fmt: skip
ARMS = {"qwen2.5_math_7b": {"nft", "rft", "dapo", "grpo"}, "qwen2.5_32b": {"nft", "nft_neg05", "rft", "dapo", "grpo", "nft_served"}}
EVERY = [(name, arm) for name, arms in ARMS.items() for arm in sorted(arms)]

# of both runs: docs/algorithm.md, arXiv 2505.18116, section 5 and the authors' script
SAME = {"prompts_per_step": 512, "n": 16, "temperature": 1.0, "top_p": 1.0, "dynamic_sampling": True}
BY_MODEL = {  # prompt, answer, tokens of a micro-batch, temperature of the evaluation, nodes, reduction_constant
    "qwen2.5_math_7b": (512, 3584, 4096, 1.0, 4, 32000.0),
    "qwen2.5_32b": (2048, 14336, 16384, 0.6, 16, 16000.0),
}
BENCHMARKS = {"aime24": 32, "aime25": 32, "amc23": 32, "math500": 1, "olympiadbench": 1, "minerva": 1}


@cache
def example(name: str, arm: str) -> Config:
    """Not to be changed."""
    return load(ROOT / "examples" / name / f"{arm}.yaml")


def test_every_example_is_looked_at():
    assert {name: {path.stem for path in (ROOT / "examples" / name).glob("*.yaml")} for name in ARMS} == ARMS


@pytest.mark.parametrize(("name", "arm"), EVERY)
def test_the_settings_are_the_papers(name, arm):
    config = example(name, arm)
    check(config)
    rollout, train, optimizer = config.rollout, config.train, config.optimizer
    prompt, answer, tokens, temperature, nodes, constant = BY_MODEL[name]
    assert {key: getattr(rollout, key) for key in SAME} == SAME
    assert (config.data.max_prompt_length, rollout.max_tokens, train.tokens_per_micro_batch) == (prompt, answer, tokens)
    assert (train.steps, train.prompts_per_update, optimizer.lr_warmup_iters) == (320, 32, 10 * 512 // 32)
    assert optimizer.lr == (5e-7 if arm == "nft_served" else 1e-6)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay, optimizer.clip_grad) == (0.9, 0.999, 0.1, 1.0)
    assert config.reward.function == "strict_box" and config.data.instruction == "boxed"
    assert config.reward.overlong_buffer == (4096 if (name, arm) == ("qwen2.5_32b", "dapo") else None)
    objective = config.objective
    assert objective.name == arm.split("_")[0]
    if arm.startswith("nft"):
        weight = 0.5 if arm == "nft_neg05" else 1.0
        assert (objective.neg_weight, objective.eps, objective.normalize, objective.reduction_constant) == (weight, 1.0, 1, constant)
    found = {of_set: (s.greedy, s.k, s.temperature, s.top_p, s.max_tokens) for of_set, s in samplings(config).items()}
    assert found == {of_set: (False, k, temperature, 0.7, answer) for of_set, k in BENCHMARKS.items()}
    assert config.plan.nodes == nodes and [d.benchmark for d in config.data.train] == ["dapo_math_17k"]


@pytest.mark.parametrize("name", ARMS)
def test_what_is_written_to_disk(name):
    """Every checkpoint is validated, so that the best can be kept; no two runs share a directory; nobody's machine is in a path."""
    configs = [example(name, arm) for arm in sorted(ARMS[name])]
    for config in configs:
        saves.check(config)
        settings = config.checkpoint
        assert (settings.interval, settings.keep, settings.keep_best, config.evaluation.interval) == (20, 2, 1, 20)
        assert not config.run_dir.startswith("/") and not config.model.path.startswith("/")
        assert saves.best_metric(config) == "validation/aime24/avg@32"
    assert len({config.run_dir for config in configs}) == len(configs)


def test_what_evaluation_costs():
    """The share that the examples' comments state: 30, 30, 40, 500, 675 and 272 problems, against 16 answers to 512 / 0.4 prompts."""
    answers = 32 * (30 + 30 + 40) + 500 + 675 + 272
    sampled = 512 / 0.4 * 16
    assert answers == 4647 and sampled == 20480 and 0.2 < answers / sampled < 0.25
    assert (320 // 20 + 1) * answers / (320 * sampled) == pytest.approx(0.012, abs=0.001)


@pytest.mark.parametrize(("name", "arm"), EVERY)
def test_megatron_and_vllm_take_the_layout(name, arm, monkeypatch):
    """All that is refused before a model is built, with the model's own sizes at the full number of ranks."""
    config, hf = example(name, arm), MODELS[name]
    cluster = Cluster.of(config)
    layout = Layout.of(config, cluster)
    monkeypatch.setenv("WORLD_SIZE", str(cluster.trainers))
    for module in (checks, model):
        monkeypatch.setattr(module, "load_weights", lambda path: SimpleNamespace(config=hf))
    monkeypatch.setattr(model, "check_tokenizer", lambda *_: None)
    policy.check(config, max_model_len(config))
    if config.rollout.mode == "colocated":
        check_world(config.rollout, cluster.gpus)
    tp = config.rollout.tensor_parallel_size
    assert hf["num_attention_heads"] % tp == hf["num_key_value_heads"] % tp == 0 and config.plan.gpus_per_node % tp == 0
    assert layout.tp <= config.plan.gpus_per_node  # tensor parallelism stays within a node
    assert cluster.gpus == {"qwen2.5_math_7b": 32, "qwen2.5_32b": 128}[name] and 0 < attention_cost(hf) < 1


def test_one_place_for_the_layout_of_32b():
    """The colocated 32B examples differ in nothing but objective, name and penalty."""
    base = example("qwen2.5_32b", "nft")
    for arm in ARMS["qwen2.5_32b"] - {"nft_served"}:
        other = example("qwen2.5_32b", arm)
        for section in ("parallel", "rollout", "train", "optimizer", "megatron", "model", "evaluation", "checkpoint", "data", "plan"):
            assert getattr(other, section) == getattr(base, section), (arm, section)


def test_served_is_the_run_but_for_its_servers():
    base, served = example("qwen2.5_32b", "nft"), example("qwen2.5_32b", "nft_served")
    assert (served.rollout.mode, served.rollout.max_staleness, served.rollout.order) == ("served", 1, "started")
    assert served.rollout.served.count * served.rollout.tensor_parallel_size == 64  # half of the GPUs
    assert served.objective == base.objective and base.objective.correction.method == "truncate"
    assert served.train == base.train and served.parallel == base.parallel and served.data == base.data

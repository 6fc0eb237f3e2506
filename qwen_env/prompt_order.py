"""Which prompt comes next: in the environments, and in the iterations of a training run."""

from typing import Literal

import numpy as np

PromptOrder = Literal["uniform", "shuffle", "sequential"]


class PromptSampler:
    """Says which of `count` prompts comes next.

    `"uniform"` draws each independently, `"shuffle"` goes through a new permutation in each round,
    `"sequential"` through 0, 1, 2, ... in every round.
    """

    def __init__(self, count: int, prompt_order: PromptOrder) -> None:
        self._count = count
        self._prompt_order = prompt_order
        self.restart()

    def restart(self) -> None:
        """Begin a new round: from here on, the order depends on the generator alone."""
        self._num_sampled = 0

    def sample(self, rng: np.random.Generator) -> int:
        """The index of the next prompt."""
        if self._prompt_order == "uniform":
            return int(rng.integers(self._count))
        place = self._num_sampled % self._count
        self._num_sampled += 1
        if self._prompt_order == "sequential":
            return place
        if place == 0:
            self._order = rng.permutation(self._count)
        return int(self._order[place])


def prompt_indices(seed: int, iteration: int, num_prompts: int, count: int) -> list[int]:
    """The prompts of a training iteration: `num_prompts` indices below `count`.

    The iterations together go through one shuffled pass over the prompts after another. A pure
    function of its arguments, so a resumed run neither repeats nor skips a prompt.
    """
    places = range(iteration * num_prompts, (iteration + 1) * num_prompts)
    rounds = {place // count for place in places}
    orders = {r: np.random.default_rng([seed, r]).permutation(count) for r in rounds}
    return [int(orders[place // count][place % count]) for place in places]

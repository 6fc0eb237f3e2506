"""Which prompt comes next."""

from typing import Literal

import numpy as np

PromptSampling = Literal["uniform", "shuffle", "sequential"]


class PromptSampler:
    """Draws indices below `count`.

    `"uniform"` draws each independently, `"shuffle"` goes through a new permutation each time
    round, `"sequential"` goes 0, 1, 2, ... and round again. After `restart` the order depends on
    nothing but the generator.
    """

    def __init__(self, count: int, sampling: PromptSampling) -> None:
        self._count = count
        self._sampling = sampling
        self.restart()

    def restart(self) -> None:
        self._num_drawn = 0

    def draw(self, rng: np.random.Generator) -> int:
        if self._sampling == "uniform":
            return int(rng.integers(self._count))
        place = self._num_drawn % self._count
        self._num_drawn += 1
        if self._sampling == "sequential":
            return place
        if place == 0:
            self._order = rng.permutation(self._count)
        return int(self._order[place])

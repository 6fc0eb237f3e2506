"""Several reward functions as one."""

from collections.abc import Mapping

import numpy as np

from qwen_env.arguments import finite
from qwen_env.errors import UsageError
from qwen_env.rewards.base import RESERVED_COMPONENTS, RewardBatch, RewardFn, score


class WeightedSum:
    """`sum_i weight_i * reward_i`, with every reward reported, unweighted, under its name.

    Args:
        terms: `{name: (weight, reward function)}`. The components of a term that has its own are
            reported as `name/component`.
    """

    def __init__(self, terms: Mapping[str, tuple[float, RewardFn]]) -> None:
        if not terms:
            raise UsageError("a weighted sum of rewards needs at least one term.")
        for name in terms:
            if not isinstance(name, str) or name in RESERVED_COMPONENTS:
                raise UsageError(
                    f"a weighted sum names a term {name!r}; names must be text, and none of "
                    f"{', '.join(map(repr, RESERVED_COMPONENTS))}, which are taken."
                )
        self.terms = {
            name: (finite(f"the weight of {name!r} in a weighted sum", weight), reward)
            for name, (weight, reward) in terms.items()
        }

    def __call__(self, batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        total = np.zeros(len(batch), np.float32)
        components = {}
        for name, (weight, reward) in self.terms.items():
            scores = score(reward, batch)
            total += weight * scores.values
            components[name] = scores.values
            components |= {f"{name}/{key}": value for key, value in scores.components.items()}
        return total, components

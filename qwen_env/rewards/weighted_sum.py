"""Several reward functions as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_env.arguments import finite
from qwen_env.errors import UsageError
from qwen_env.rewards.base import NAMES_ALLOWED, RewardBatch, RewardFn, may_be_named, score


class WeightedSum:
    """`sum_i weight_i * reward_i`, with every reward reported, unweighted, under its name.

    Args:
        terms: `{name: (weight, reward function)}`. The components of a term that has its own are
            reported as `name/component`; an "accuracy" that only one of them has is the sum's too.

    Raises:
        UsageError: there is no term, or one has a wrong name, weight or reward function.
    """

    def __init__(self, terms: Mapping[str, tuple[float, RewardFn]]) -> None:
        if not terms:
            raise UsageError("a weighted sum of rewards needs at least one term.")
        self.terms: dict[str, tuple[float, RewardFn]] = {}
        for name, term in terms.items():
            if not may_be_named(name):
                raise UsageError(f"a weighted sum names a term {name!r}; {NAMES_ALLOWED}.")
            weight, reward = weight_and_reward(name, term)
            weight = finite(f"the weight of {name!r} in a weighted sum", weight)
            if not callable(reward):
                raise UsageError(
                    f"the reward of {name!r} in a weighted sum is {reward!r}; it must be a "
                    "callable (load_reward makes one from a string)."
                )
            self.terms[name] = (weight, reward)

    def __call__(
        self, batch: RewardBatch
    ) -> tuple[np.ndarray | Sequence[np.ndarray], dict[str, np.ndarray]]:
        total = np.zeros(len(batch), np.float32)
        by_token: list[np.ndarray] | None = None  # of the terms that have a number for each token
        components: dict[str, np.ndarray] = {}
        accuracies = []
        for name, (weight, reward) in self.terms.items():
            scores = score(reward, batch)
            if scores.tokens is None:
                total += weight * scores.values
            else:
                new = [weight * row for row in scores.tokens]
                by_token = new if by_token is None else [*map(np.add, by_token, new)]
            components[name] = scores.values
            components |= {f"{name}/{key}": value for key, value in scores.components.items()}
            if "accuracy" in scores.components:
                accuracies.append(scores.components["accuracy"])
        if len(accuracies) == 1 and "accuracy" not in components:
            components["accuracy"] = accuracies[0]
        if by_token is None:
            return total, components
        for row, rest in zip(by_token, total, strict=True):
            row[-1] += rest  # numbers for whole rows belong to their ends
        return by_token, components


def weight_and_reward(name: Any, term: Any) -> tuple[Any, Any]:
    """The two parts of the term called `name`.

    Raises:
        UsageError: it has others.
    """
    try:
        weight, reward = term
    except (TypeError, ValueError):
        raise UsageError(
            f"the term {name!r} of a weighted sum is {term!r}; it must be (weight, reward)."
        ) from None
    return weight, reward

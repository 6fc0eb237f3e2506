"""What a reward function is, and the one place where its answer is checked.

A reward function is any callable that takes a `RewardBatch` and returns one number a row:

    def shorter_is_better(batch: RewardBatch) -> np.ndarray:
        return np.array([-len(ids) for ids in batch.completion_ids], np.float32)

It may return `(scores, components)` instead, where `components` maps names to arrays of the same
length; they are reported, not trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium.error import DependencyNotInstalled

from qwen_env.errors import UsageError


@dataclass(frozen=True)
class RewardBatch:
    """N finished episodes. Every field has length N.

    `completion_ids` are the tokens as they were chosen, the end-of-sequence id included;
    `completions` is their text without special tokens. `rows` are the prompts' dataset rows, with
    all their columns. `finish_reasons` are `"eos"` or `"length"`.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    prompt_ids: Sequence[np.ndarray]
    completion_ids: Sequence[np.ndarray]
    rows: Sequence[Mapping[str, Any]]
    finish_reasons: Sequence[str]

    def __len__(self) -> int:
        return len(self.completions)


class RewardFn(Protocol):
    def __call__(
        self, batch: RewardBatch, /
    ) -> np.ndarray | tuple[np.ndarray, Mapping[str, np.ndarray]]: ...


class RewardError(UsageError):
    """A reward function raised, or returned something that cannot be a reward."""


@dataclass(frozen=True)
class Scores:
    """Checked rewards: `values` float32 [N], and named `components`, float32 [N] each."""

    values: np.ndarray
    components: Mapping[str, np.ndarray]


def score(reward: RewardFn, batch: RewardBatch) -> Scores:
    """Call `reward` and check what it returns.

    Raises:
        RewardError: it raised, returned another count, a type that is not a number, or a value
            that is not finite; the message names the function and the row.
        gymnasium.error.DependencyNotInstalled: it needs an extra that is not there.
    """
    name = reward_name(reward)
    try:
        answer = reward(batch)
    except (RewardError, DependencyNotInstalled):
        raise
    except Exception as error:
        raise RewardError(
            f"The reward function {name} raised {type(error).__name__}: {error}"
        ) from error
    values, components = answer if isinstance(answer, tuple) else (answer, {})
    return Scores(
        _checked(values, len(batch), f"The reward function {name}"),
        {
            key: _checked(value, len(batch), f"Component {key!r} of the reward function {name}")
            for key, value in components.items()
        },
    )


def reward_name(reward: RewardFn) -> str:
    """How messages call a reward function."""
    kind = type(reward)
    module = getattr(reward, "__module__", kind.__module__)
    return f"{module}.{getattr(reward, '__qualname__', kind.__qualname__)}"


def _checked(values: Any, count: int, who: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{who} must return numbers; {error}.") from error
    if array.shape != (count,):
        raise RewardError(
            f"{who} returned shape {array.shape} for a batch of {count}; it must return "
            f"one number a row, shape ({count},)."
        )
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise RewardError(f"{who} returned {array[row]} for row {row}; rewards must be finite.")
    return array

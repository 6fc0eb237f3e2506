"""Tasks of `reasoning-gym`: generated questions whose answers can be verified."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_env.errors import UsageError
from qwen_env.extras import import_extra
from qwen_env.rewards.base import RewardBatch


class ReasoningGym:
    """A task of `reasoning-gym`, as prompts and as the reward that verifies their answers.

        task = ReasoningGym("chain_sum", size=500, seed=0)
        env = gymnasium.make("QwenText-v0", tokenizer=..., prompts=task.prompts, reward=task)

    The reward is the task's own score in [0, 1] of what is between `<answer>` and `</answer>`
    in the completion, or of the whole completion.

    Args:
        name: the task's name in `reasoning-gym`.
        size: the number of questions.
        seed: decides which questions.
        config: the task's own options.

    Raises:
        UsageError: no such task, or an option that it does not take.
        gymnasium.error.DependencyNotInstalled: `reasoning-gym` is missing.
    """

    def __init__(self, name: str, *, size: int = 500, seed: int = 0, **config: Any) -> None:
        reasoning_gym = import_extra("reasoning_gym", package="reasoning-gym")
        try:
            self._dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
        except (ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"reasoning-gym task {name!r}: {error}.") from error
        self._extract = import_extra("reasoning_gym.utils", package="reasoning-gym").extract_answer

    @property
    def prompts(self) -> list[Mapping[str, Any]]:
        """One row per question: `prompt`, and the `entry` that it came from."""
        return [{"prompt": entry["question"], "entry": entry} for entry in self._dataset]

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """The verified scores, float32 [N]."""
        scores = []
        for completion, row in zip(batch.completions, batch.rows, strict=True):
            answer = self._extract(completion) or completion.strip()
            scores.append(self._dataset.score_answer(answer, row["entry"]))
        return np.array(scores, np.float32)

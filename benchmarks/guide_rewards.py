"""Rewards for the runs of `docs/when_it_goes_wrong.md`: each is a mistake that people make."""

import numpy as np

from qwen_env.rewards import RewardBatch


def length(batch: RewardBatch) -> np.ndarray:
    """How long each response is: -1 with no token, 0 with 14, 1 with 28; float32 [N]."""
    return np.array([len(ids) / 14 - 1 for ids in batch.completion_ids], np.float32)


def rare(batch: RewardBatch) -> np.ndarray:
    """1 for a review that has two words which seldom meet, else 0; float32 [N]."""
    return np.array(
        ["brilliant" in text and "recommend" in text for text in batch.completions], np.float32
    )

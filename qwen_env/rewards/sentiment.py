"""Small rewards for film reviews. All read the whole review, prompt and completion."""

from functools import cache
from typing import Any

import numpy as np

from qwen_env.extras import import_extra
from qwen_env.rewards.base import RewardBatch


def pocket_sentiment(batch: RewardBatch) -> np.ndarray:
    """How positive the pocket grammar knows a review to be, float32 [N] in [-1, 1]."""
    from qwen_env.pocket.grammar import sentiment

    return np.array([sentiment(review) for review in _reviews(batch)], np.float32)


def pocket_grammatical(batch: RewardBatch) -> np.ndarray:
    """1 for each review that the pocket grammar can produce, else 0; float32 [N]."""
    from qwen_env.pocket.grammar import is_grammatical

    return np.array([is_grammatical(review) for review in _reviews(batch)], np.float32)


def vader_compound(batch: RewardBatch) -> np.ndarray:
    """VADER's compound score of each review, float32 [N] in [-1, 1]."""
    analyzer = _vader()
    scores = [analyzer.polarity_scores(review)["compound"] for review in _reviews(batch)]
    return np.array(scores, np.float32)


def _reviews(batch: RewardBatch) -> list[str]:
    return [p + c for p, c in zip(batch.prompts, batch.completions, strict=True)]


@cache
def _vader() -> Any:
    module = import_extra("vaderSentiment.vaderSentiment", package="vaderSentiment")
    return module.SentimentIntensityAnalyzer()

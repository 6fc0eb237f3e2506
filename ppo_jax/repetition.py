"""How much a batch of completions repeats itself: what a policy that collapses does first."""

from collections.abc import Sequence

import numpy as np


def repetition(completions: Sequence[np.ndarray]) -> dict[str, float]:
    """Diversity of a batch of completions, as token ids.

    Returns:
        text/distinct_1, text/distinct_2: different 1-grams and 2-grams in the whole batch, as a
            share of all of them (Li et al. 2016, arXiv:1510.03055). They fall as responses become
            alike, and with the batch's size: compare batches of one size.
        text/repeated_4: share of 4-grams that stood earlier in the same completion.
    """
    return {
        "text/distinct_1": _distinct(completions, 1),
        "text/distinct_2": _distinct(completions, 2),
        "text/repeated_4": _repeated(completions, 4),
    }


def _distinct(completions: Sequence[np.ndarray], n: int) -> float:
    grams = [gram for ids in completions for gram in _ngrams(ids, n)]
    return len(set(grams)) / max(len(grams), 1)


def _repeated(completions: Sequence[np.ndarray], n: int) -> float:
    each = [_ngrams(ids, n) for ids in completions]
    repeats = sum(len(grams) - len(set(grams)) for grams in each)
    return repeats / max(sum(map(len, each)), 1)


def _ngrams(ids: np.ndarray, n: int) -> list[tuple[int, ...]]:
    row = ids.tolist()
    return list(zip(*(row[i:] for i in range(n)), strict=False))

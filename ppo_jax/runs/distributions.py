"""Records of `distributions.jsonl`: what single numbers would hide of an iteration.

    ratio                counts of π_new / π_old over the tokens of all minibatches
    advantage            counts of advantages, in standard deviations from their mean
    length               counts of responses with 1, 2, ..., T tokens
    kl_by_position       log π_old - log π_ref, a mean over the batch: tokens 1, 2, ..., T
    entropy_by_position  likewise; null where no response is that long

The bins of the first two are `algorithm.RATIO_EDGES` and `algorithm.ADVANTAGE_EDGES`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ppo_jax.algorithm import ADVANTAGE_EDGES, RATIO_EDGES
from ppo_jax.runs.records import Record

_DIGITS = 5  # significant ones
_EDGES = {"ratio": RATIO_EDGES, "advantage": ADVANTAGE_EDGES}


def distributions_record(iteration: int, distributions: Mapping[str, np.ndarray]) -> Record:
    """The record of an iteration, its numbers of a few digits."""
    rounded = {
        name: [float(f"{x:.{_DIGITS}g}") if isinstance(x, float) else x for x in array.tolist()]
        for name, array in distributions.items()
    }
    return {"iteration": iteration, **rounded}


def as_histogram(name: str, values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Edges [bins + 1] and heights [bins] of what a record holds under `name`.

    Means by position are drawn as if they were counts: position is the axis, and the mean the
    height, or 0 where it is negative or unknown.
    """
    edges = _EDGES.get(name, np.arange(len(values) + 1) + 0.5)
    heights = np.nan_to_num(np.array(values, float))  # null becomes NaN
    return edges, np.maximum(heights, 0.0)

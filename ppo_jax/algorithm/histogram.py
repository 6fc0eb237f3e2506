"""Counts of the valid entries of an array, bin by bin."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Real, Shaped

from ppo_jax.algorithm.masking import AnyArray

RATIO_EDGES = np.linspace(0.0, 2.0, 41)
"""Of histograms of π_new / π_old: no move is 1, the usual clip lies at 0.8 and 1.2."""
ADVANTAGE_EDGES = np.linspace(-5.0, 5.0, 41)
"""Of histograms of advantages, in standard deviations from their mean."""


def masked_histogram(
    x: Real[AnyArray, "*shape"], mask: Shaped[AnyArray, "*shape"], edges: Real[AnyArray, "edges"]
) -> Int[Array, "bins"]:
    """How many valid entries lie between each two neighbouring edges, the lower one included.

    What lies beyond the outer edges counts in the outer bins, and NaN in the last, so that the
    counts add up to Σ mask.
    """
    bins = len(edges) - 1
    place = jnp.searchsorted(jnp.asarray(edges, jnp.float32), x, side="right") - 1
    place = jnp.where(mask, jnp.clip(place, 0, bins - 1), bins)
    return jnp.zeros(bins + 1, jnp.int32).at[place].add(1)[:bins]

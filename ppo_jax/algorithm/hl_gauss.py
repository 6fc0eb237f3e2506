"""Values learnt as a classification: HL-Gauss (Imani, White 2018, arXiv:1806.04613), as in "Stop
Regressing" (Farebrother et al. 2024, arXiv:2403.03950).

A return becomes a histogram, that of a normal distribution around it, and the value function learns
to say it by cross-entropy. Its value is the mean of the histogram that it says.

Shapes: K bins.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Real, Shaped

from ppo_jax.algorithm.masking import AnyArray, masked_mean, zero_invalid

_SIGMA_PER_WIDTH = 0.75  # the paper's, which spreads a return over about six bins


class Bins(NamedTuple):
    """K bins of one width, from `low` to `high`, in units of value."""

    low: float
    high: float
    number: int

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.high - self.low) / self.number

    @property
    def centers(self) -> Float[Array, "bins"]:
        """The middle of each bin."""
        return self.low + self.width * (jnp.arange(self.number, dtype=jnp.float32) + 0.5)


def expected_value(logits: Real[AnyArray, "*shape K"], bins: Bins) -> Float[Array, "*shape"]:
    """The mean of the histogram softmax(logits), each bin at its middle."""
    probabilities = jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    return probabilities @ bins.centers


def hl_gauss_targets(returns: Real[AnyArray, "*shape"], bins: Bins) -> Float[Array, "*shape K"]:
    """The share of each bin in N(G, σ²), σ being 3/4 of a bin's width, over that of all bins.

    A return out of the range counts as the nearest end of it.
    """
    edges = bins.low + bins.width * jnp.arange(bins.number + 1, dtype=jnp.float32)
    clipped = jnp.clip(jnp.asarray(returns, jnp.float32), bins.low, bins.high)
    sigma = _SIGMA_PER_WIDTH * bins.width
    below = jax.scipy.special.erf((edges - clipped[..., None]) / (math.sqrt(2) * sigma))
    return jnp.diff(below) / (below[..., -1:] - below[..., :1])


def hl_gauss_loss(
    logits: Real[AnyArray, "*shape K"],
    returns: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    bins: Bins,
    *,
    weights: Real[AnyArray, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Mean of -Σ_k pₖ log softmax(logits)ₖ, p being the histogram of the return.

    Its least value is not 0 but the entropy of p, about 1.2 nats within the range.

    Args:
        logits: the value head's present outputs.
        returns: Gₜ, data.
        mask: True where a step is real.
        weights: as in `ppo_jax.algorithm.losses`.
    """
    chex.assert_equal_shape([returns, mask])
    chex.assert_equal_shape_prefix([logits, returns], jnp.ndim(returns))
    is_real = jnp.asarray(mask, bool)[..., None]
    log_q = jax.nn.log_softmax(jnp.where(is_real, jnp.asarray(logits, jnp.float32), 0.0))
    targets = hl_gauss_targets(zero_invalid(returns, mask), bins)
    return masked_mean(-(targets * log_q).sum(-1), mask, weights=weights)

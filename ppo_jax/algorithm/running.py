"""Mean and variance of a stream of numbers, a batch at a time."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Real

from ppo_jax.algorithm.masking import AnyArray

_ROUNDING = 2.0**-8
"""Of bfloat16, in which reward models compute: equal numbers may seem so far apart, relatively."""


class RunningMoments(NamedTuple):
    """What is kept of all numbers seen so far; float32 scalars."""

    number: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]  # sum of the squared distances from the mean

    @property
    def std(self) -> Float[Array, ""]:
        """Population standard deviation; 1 as long as it is no more than rounding of the mean.

        So their mean, divided by it, is below 256. Scores that are all 0.5, but for the rounding of
        the model that gave them, would be 100,000 otherwise.
        """
        variance = self.squares / jnp.maximum(self.number, 1)
        is_spread = variance > jnp.square(_ROUNDING * self.mean)
        return jnp.where(is_spread, jnp.sqrt(jnp.where(is_spread, variance, 1.0)), 1.0)


def no_moments() -> RunningMoments:
    """Of no numbers."""
    return RunningMoments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def updated_moments(moments: RunningMoments, x: Real[AnyArray, "N"]) -> RunningMoments:
    """With the numbers of one more batch (Chan, Golub & LeVeque 1979, equation 2.1).

    A batch whose squares are not finite is left out: its infinity would stay for ever.
    """
    x = jnp.asarray(x, jnp.float32)
    mean, new = jnp.mean(x), jnp.float32(x.size)
    number = moments.number + new
    distance = mean - moments.mean
    updated = RunningMoments(
        number=number,
        mean=moments.mean + distance * new / number,
        squares=moments.squares
        + jnp.sum(jnp.square(x - mean))
        + jnp.square(distance) * moments.number * new / number,
    )
    is_finite = jnp.isfinite(updated.squares)
    return RunningMoments(
        *(jnp.where(is_finite, new, old) for new, old in zip(updated, moments, strict=True))
    )

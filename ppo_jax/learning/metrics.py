"""What an iteration says of itself, on the device and as it reaches the host."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float


class Quotient(NamedTuple):
    """A number, or several, that may be 0 / 0, so undefined.

    It is divided on the host: no program makes a NaN on purpose, so that `JAX_DEBUG_NANS=1`, which
    stops at the first, finds the one that somebody looks for.
    """

    numerator: Float[Array, "..."]
    denominator: Float[Array, "..."]


Metrics = dict[str, Array | Quotient]  # scalars
Distributions = dict[str, Array | Quotient]  # histograms (`algorithm.histogram`), means by position


def fetch(
    metrics: Metrics, distributions: Distributions
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Both from the device, in one transfer; quotients divided, NaN where they are undefined."""

    def divided(x: Any) -> np.ndarray:
        if not isinstance(x, Quotient):
            return np.asarray(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(x.denominator == 0, np.nan, np.divide(*x))

    metrics, distributions = jax.device_get((metrics, distributions))
    return (
        {name: float(divided(x)) for name, x in metrics.items()},
        {name: divided(x) for name, x in distributions.items()},
    )

"""Statistics over the valid entries of an array.

A response is shorter than the array that holds it, so every array of tokens travels with a `mask`
that is True where an entry is real. What stands elsewhere is unspecified, NaN and infinity
included, and `NaN * 0` is NaN: so it is replaced before any arithmetic, never multiplied away.
"""

from typing import Literal, get_args

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Real, Shaped

AnyArray = Array | np.ndarray
"""What these functions take, of any real type; what they give is JAX's, in float32."""
Scalar = int | float | Real[AnyArray, ""]
"""A coefficient, which may be traced."""

Aggregation = Literal["token", "sequence"]

_WHITEN_EPSILON = 1e-8


def zero_invalid(
    x: Shaped[AnyArray, "*shape"], mask: Shaped[AnyArray, "*shape"]
) -> Float[Array, "*shape"]:
    """`x` in float32 where `mask` is True, 0 elsewhere.

    The gradient with respect to an invalid entry is exactly 0, and whatever is computed from the
    result sees a finite number there, so that no NaN is born on the way back either.
    """
    chex.assert_equal_shape([x, mask])
    return jnp.where(jnp.asarray(mask, bool), jnp.asarray(x, jnp.float32), 0.0)


def masked_mean(
    x: Shaped[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    *,
    weights: Real[AnyArray, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Mean of the valid entries, Σ mask·x / Σ mask; 0 when none is valid.

    Args:
        x: any shape.
        mask: True where `x` is valid.
        weights: of the entries, instead of 1 / Σ mask each: the result is Σ mask·weights·x. With
            those of a whole minibatch (`token_weights`), the results of its micro-batches add up
            to the minibatch's mean, however it was cut.

    Returns:
        float32 scalar.
    """
    x = zero_invalid(x, mask)
    if weights is not None:
        return jnp.sum(zero_invalid(weights, mask) * x)
    count = jnp.sum(jnp.asarray(mask, bool))
    return jnp.sum(x) / jnp.where(count == 0, 1, count).astype(jnp.float32)


def token_weights(
    mask: Shaped[AnyArray, "B T"], aggregation: Aggregation = "token"
) -> Float[Array, "B T"]:
    """What each token counts for in a mean over a minibatch: at least 0, in all 1.

        "token"      1 / Σ mask                  a long response counts for more than a short one
        "sequence"   1 / (rows · row's length)   every response counts alike, its tokens for less

    Args:
        mask: True where a token is real. Rows without any do not count as rows.

    Returns:
        float32 [B, T]; 0 where `mask` is False.

    Raises:
        ValueError: `aggregation` has another name.
    """
    chex.assert_rank(mask, 2)
    mask = jnp.asarray(mask, bool)
    match aggregation:
        case "token":
            share = jnp.sum(mask)[None, None]
        case "sequence":
            length = jnp.sum(mask, axis=1, keepdims=True)
            share = length * jnp.sum(length > 0)
        case _:
            raise ValueError(
                f"There is no aggregation {aggregation!r}; choose one of "
                f"{', '.join(get_args(Aggregation))}."
            )
    return jnp.where(mask, 1 / jnp.maximum(share, 1).astype(jnp.float32), 0.0)


def masked_var(x: Real[AnyArray, "*shape"], mask: Shaped[AnyArray, "*shape"]) -> Float[Array, ""]:
    """Population variance (divided by n, not n - 1) of the valid entries; 0 when none is valid."""
    return masked_mean(jnp.square(_centre(x, mask)), mask)


def masked_whiten(
    x: Real[AnyArray, "*shape"], mask: Shaped[AnyArray, "*shape"], *, shift_mean: bool = True
) -> Float[Array, "*shape"]:
    """Scale the valid entries to unit (population) variance: (x - μ) / √(σ² + 1e-8).

    Args:
        x: any shape.
        mask: True where `x` is valid.
        shift_mean: move the mean to 0, as for advantages. False puts μ back after scaling, as for
            rewards, whose mean says whether an episode was worth having.

    Returns:
        float32, shaped like `x`; 0 where `mask` is False.
    """
    centred = _centre(x, mask)
    scaled = centred * lax.rsqrt(masked_mean(jnp.square(centred), mask) + _WHITEN_EPSILON)
    return scaled if shift_mean else zero_invalid(scaled + masked_mean(x, mask), mask)


def _centre(
    x: Real[AnyArray, "*shape"], mask: Shaped[AnyArray, "*shape"]
) -> Float[Array, "*shape"]:
    """x - μ. Centred twice: the first mean is off by the rounding of a long sum, which a constant
    `x` would show as a spread of its own."""
    once = zero_invalid(x - masked_mean(x, mask), mask)
    return zero_invalid(once - masked_mean(once, mask), mask)

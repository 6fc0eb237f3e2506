"""Work on ragged responses without computing all of their padding.

A compiled program has one shape, that of the longest response there may be. With K buckets it holds
K versions of the costly part, for responses up to T/K, 2T/K, ..., T tokens, and takes the shortest
one that will do. Nothing is compiled anew as lengths change, and results stay as they are: what is
left out is padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def bucket_limits(limit: int, num_buckets: int) -> tuple[int, ...]:
    """The longest response of each bucket, ascending; the last is `limit`."""
    return tuple(sorted({-(-limit * k // num_buckets) for k in range(1, num_buckets + 1)}))


def at_bucket(
    function: Callable[..., Any], longest: Int[Array, ""], limits: tuple[int, ...], *operands: Any
) -> Any:
    """`function(limit, *operands)` at the first of `limits` that is at least `longest`.

    Its result must have the same shapes for every limit.
    """
    if len(limits) == 1:
        return function(limits[0], *operands)
    bucket = jnp.searchsorted(jnp.asarray(limits), longest)
    branches = [lambda *operands, limit=limit: function(limit, *operands) for limit in limits]
    return jax.lax.switch(bucket, branches, *operands)

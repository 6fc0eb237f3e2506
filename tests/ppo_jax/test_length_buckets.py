"""Shorter programs for shorter responses: the same results, less padding computed."""

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.length_buckets import at_bucket, bucket_limits


@pytest.mark.parametrize(
    ("limit", "num_buckets", "expected"),
    [(28, 1, (28,)), (28, 4, (7, 14, 21, 28)), (10, 4, (3, 5, 8, 10)), (2, 4, (1, 2))],
)
def test_limits(limit: int, num_buckets: int, expected: tuple[int, ...]) -> None:
    assert bucket_limits(limit, num_buckets) == expected


@pytest.mark.parametrize("jitted", [False, True])
def test_the_first_limit_that_will_do(jitted: bool) -> None:
    limits = (3, 5, 8, 10)

    def taken(longest: jax.Array) -> jax.Array:
        return at_bucket(lambda limit, x: x + limit, longest, limits, jnp.zeros((), jnp.int32))

    taken = jax.jit(taken) if jitted else taken
    for longest in range(11):
        assert taken(jnp.asarray(longest)) == next(x for x in limits if x >= longest)

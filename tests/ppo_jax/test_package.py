"""What importing the package must have done."""

import jax
import jax.numpy as jnp
import numpy as np


def test_fused_matrix_products_are_right_on_this_jaxlib():
    """A case that jaxlib 0.10.2 gets wrong by default (jax issue 39103)."""
    count = 32_769
    rows = np.zeros((count, 3), np.float32)
    rows[:, 0] = np.arange(count)
    identity = jnp.eye(3)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((identity @ row) ** 2)))(rows)
    np.testing.assert_array_equal(squares, rows[:, 0] ** 2)

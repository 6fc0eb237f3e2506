"""What importing the package must have done."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_fused_matrix_products_are_right_on_this_jaxlib():
    """A case that jaxlib 0.10.2 gets wrong by default (jax issue 39103)."""
    count = 32_769
    rows = np.zeros((count, 3), np.float32)
    rows[:, 0] = np.arange(count)
    identity = jnp.eye(3)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((identity @ row) ** 2)))(rows)
    np.testing.assert_array_equal(squares, rows[:, 0] ** 2)


@pytest.mark.parametrize("asked", [None, "default"])
def test_products_in_float32_are_in_float32_unless_asked_otherwise(asked):
    code = "import jax, ppo_jax; print(jax.config.jax_default_matmul_precision)"
    environment = os.environ | ({"JAX_DEFAULT_MATMUL_PRECISION": asked} if asked else {})
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == (asked or "highest")

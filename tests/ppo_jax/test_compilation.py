"""Programs compiled by this project are right, whatever the process's settings are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.compilation import float32_products, jit


def test_fused_matrix_products_are_right_on_this_jaxlib() -> None:
    """A case that jaxlib 0.10.2 gets wrong by default (jax issue 39103)."""
    count = 32_769
    rows = np.zeros((count, 3), np.float32)
    rows[:, 0] = np.arange(count)
    identity = jnp.eye(3)
    squares = jit(jax.vmap(lambda row: jnp.sum((identity @ row) ** 2)))(rows)
    np.testing.assert_array_equal(squares, rows[:, 0] ** 2)


def precisions(function: object) -> str:
    x = jnp.ones((3, 3))
    return function.lower(x).as_text()  # type: ignore[attr-defined]


@pytest.mark.parametrize("differentiate", [False, True])
def test_products_in_float32_are_in_float32(differentiate: bool) -> None:
    def product(x: jax.Array) -> jax.Array:
        return (x @ x).sum()

    function = jax.grad(product) if differentiate else product
    ours, theirs = precisions(jit(function)), precisions(jax.jit(function))
    count = ours.count("dot_general")
    assert count == (2 if differentiate else 1)
    assert ours.count("precision = [HIGHEST, HIGHEST]") == count
    assert "HIGHEST" not in theirs, "those of others stay as they are"


def test_unless_jax_is_told_otherwise() -> None:
    with jax.default_matmul_precision("bfloat16"), float32_products():
        assert "HIGHEST" not in precisions(jax.jit(lambda x: x @ x))


def test_options_are_those_of_jax() -> None:
    x = jnp.ones(3)
    double = jit(lambda x, times: x * times, static_argnames="times", donate_argnums=0)
    np.testing.assert_array_equal(double(x, times=2), [2, 2, 2])
    assert x.is_deleted()


def test_a_loop_over_layers_in_bfloat16_makes_no_float32_copy_of_them() -> None:
    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ weight.astype(jnp.float32)), None

    layers = jnp.ones((16, 64, 64), jnp.bfloat16)
    program = jit(lambda x, layers: jax.lax.scan(layer, x, layers)[0])
    memory = program.lower(jnp.ones((4, 64)), layers).compile().memory_analysis()
    assert memory.temp_size_in_bytes < layers.nbytes

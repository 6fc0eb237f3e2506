"""Operations of a layer whose gradients are written out.

Gradients of what positions share (a bias, a norm's weight, a row of the embedding table) are sums
over positions. JAX would sum them in the type of the activations, and a sum in bfloat16 stands
still once it is 256 times what is added to it: over 8,192 positions, a bias lost half of its
gradient. Here they are summed in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def broadcast(
    vector: Float[Array, "D"], shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "*batch D"]:
    """`vector` in another type, at each of many positions."""
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _broadcast_forward(
    vector: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> tuple[Array, Array]:
    return broadcast(vector, shape, dtype), vector


def _broadcast_backward(
    shape: tuple[int, ...], dtype: DTypeLike, vector: Array, cotangent: Array
) -> tuple[Array]:
    positions = tuple(range(len(shape) - 1))
    return (cotangent.astype(jnp.float32).sum(positions).astype(vector.dtype),)


broadcast.defvjp(_broadcast_forward, _broadcast_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table: Float[Array, "V D"], ids: Int[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch D"]:
    """Rows of `table`, in another type."""
    return table[ids].astype(dtype)


def _embed_forward(table: Array, ids: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return embed(table, ids, dtype), (table, ids)


def _embed_backward(
    dtype: DTypeLike, inputs: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    table, ids = inputs
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(cotangent.astype(jnp.float32))
    return total.astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]
) -> Float[Array, "*batch F"]:
    """silu(gate) ⊙ up.

    Its gradients have their division last. XLA:CPU computes what ends in a product once more,
    column by column, where the weights' gradient wants it transposed; what ends in a division it
    computes once. The gradient of all 30 layers of SmolLM2-135M, over 8 x 56 tokens on two cores,
    takes 0.78 of the time that it takes with JAX's own (0.74 to 0.91 in 11 alternations).
    """
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    gate, up = inputs
    inverse_sigmoid = 1 + jnp.exp(-gate)
    slope = 1 + gate * jax.nn.sigmoid(-gate)  # of silu, over sigmoid(gate)
    return cotangent * up * slope / inverse_sigmoid, cotangent * gate / inverse_sigmoid


swiglu.defvjp(_swiglu_forward, _swiglu_backward)

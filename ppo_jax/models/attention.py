"""Attention: softmax(q·k / √N) v, and its gradient.

Where a GPU or a TPU has a kernel that will do, `attend` takes it (`attention_kernels`), and
elsewhere the formula: on a CPU, in a step of generation, for sequences that share rows of a GPU.

The formula's gradient is written out, in products of the compute type. Left to itself, JAX
multiplies float32 gradients of the logits by keys and queries widened to float32, half as fast on a
GPU or slower, and goes over arrays as large as the logits about twice as often.

Shapes: B batch, Q query positions, S key positions, H heads, K KV heads, G = H / K query heads per
KV head, R = G · Q rows of a KV head, N head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.attention_kernels import kernels

BLOCK = 256
"""Query positions that are computed together: fewer would save more, and take longer to compile."""


_LEAST = float(np.finfo(np.float32).min)


class KeyValue(NamedTuple):
    """The keys and values of one layer, which a cache keeps for later tokens."""

    key: Float[Array, "B K S N"]
    value: Float[Array, "B K S N"]


class Sequences(NamedTuple):
    """Rows of sequences, each position of which sees its own sequence up to its own place."""

    number: Int[Array, "B S"]  # of the sequence there; 0 is padding
    mask: Bool[Array, "B S S"]  # the keys that each query sees
    is_one_a_row: bool  # each row has one sequence, from its start on


def sequences(
    attention_mask: Int[Array, "B S"] | Bool[Array, "B S"] | Int[Array, "B"], size: int
) -> Sequences:
    """Of S = `size` positions; for `attention_mask` see `decoder.Decoder`."""
    place = jnp.arange(size)
    is_one_a_row = attention_mask.ndim == 1
    number = place < attention_mask[:, None] if is_one_a_row else attention_mask
    number = number.astype(jnp.int32)
    mask = (place[:, None] >= place) & (number[:, :, None] == number[:, None, :])
    return Sequences(number, mask & (number > 0)[:, None, :], is_one_a_row)


def written(
    cache: Float[Array, "B K S N"],
    new: Float[Array, "B K Q N"],
    slot: Int[Array, ""] | Int[Array, "B"] | int,
) -> Float[Array, "B K S N"]:
    """`cache` with `new` in Q slots from `slot` on: one for all rows, or one a row.

    One a row takes longer, and leaves out what would stand beyond the last slot.
    """
    if jnp.ndim(slot) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=2)
    rows = jnp.arange(cache.shape[0])[:, None]
    slots = jnp.asarray(slot)[:, None] + jnp.arange(new.shape[2])
    return cache.at[rows, :, slots].set(jnp.swapaxes(new, 1, 2), mode="drop")


def attend(
    query: Float[Array, "B H Q N"], key_value: KeyValue, seen: Bool[Array, "B Q S"] | Sequences
) -> Float[Array, "B H Q N"]:
    """softmax(q·k / √N) v. A query whose keys are all masked gets some mean of values, not NaN.

    Args:
        seen: the keys that each query sees; where Q = S, none after the query's own place. Keys
            behind its last column are not read.
    """
    if not isinstance(seen, Sequences):
        key, value = (x[:, :, : seen.shape[-1]] for x in key_value)
        return _attend_by_formula(query, key, value, seen)
    found = kernels(query, key_value.key, is_one_a_row=seen.is_one_a_row)
    if not found:
        return _attend_by_formula(query, *key_value, seen.mask)

    def by_formula(query: Array, key: Array, value: Array, number: Array) -> Array:
        return _attend_by_formula(query, key, value, seen.mask)

    arrays = query, *key_value, seen.number
    mixed: Array = jax.lax.platform_dependent(*arrays, **found, default=by_formula)
    return mixed


def _attend_by_formula(
    query: Float[Array, "B H Q N"],
    key: Float[Array, "B K S N"],
    value: Float[Array, "B K S N"],
    mask: Bool[Array, "B Q S"],
) -> Float[Array, "B H Q N"]:
    key_value = KeyValue(key, value)
    if query.shape[2] == key_value.key.shape[2] > BLOCK:
        return _attend_in_blocks(query, key_value, mask)
    batch, heads, queries, size = query.shape
    kv_heads = key_value.key.shape[1]
    # One matrix product a KV head: its G query heads are rows beside their positions.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, size)
    return _attend_in_groups(grouped, key_value, mask).reshape(query.shape)


def _attend_in_blocks(query: Array, key_value: KeyValue, mask: Array) -> Array:
    """Of a block of queries with the keys up to its end, since none beyond that is seen."""
    blocks = []
    for start in range(0, query.shape[2], BLOCK):
        end = start + BLOCK  # or beyond the last one
        seen = KeyValue(key_value.key[:, :, :end], key_value.value[:, :, :end])
        blocks.append(_attend_by_formula(query[:, :, start:end], *seen, mask[:, start:end, :end]))
    return jnp.concatenate(blocks, axis=2)


@jax.custom_vjp
def _attend_in_groups(
    query: Float[Array, "B K R N"], key_value: KeyValue, mask: Bool[Array, "B Q S"]
) -> Float[Array, "B K R N"]:
    return _attend_forward(query, key_value, mask)[0]


def _attend_forward(
    query: Array, key_value: KeyValue, mask: Array
) -> tuple[Array, tuple[Array, KeyValue, Array, Array, Array]]:
    logits = jnp.einsum("BKRN,BKSN->BKRS", query, key_value.key, preferred_element_type=jnp.float32)
    by_query = logits.reshape(*logits.shape[:2], -1, *mask.shape[1:]) / math.sqrt(query.shape[-1])
    by_query = jnp.where(mask[:, None, None], by_query, _LEAST)
    weights = jax.nn.softmax(by_query, axis=-1).astype(query.dtype).reshape(logits.shape)
    mixed = jnp.einsum("BKRS,BKSN->BKRN", weights, key_value.value)
    return mixed, (query, key_value, mask, weights, mixed)


def _attend_backward(
    inputs: tuple[Array, KeyValue, Array, Array, Array], cotangent: Array
) -> tuple[Array, KeyValue, None]:
    query, key_value, mask, weights, mixed = inputs
    d_value = jnp.einsum("BKRS,BKRN->BKSN", weights, cotangent)
    d_weights = jnp.einsum(
        "BKRN,BKSN->BKRS", cotangent, key_value.value, preferred_element_type=jnp.float32
    )
    # Σ_s weights · d_weights, from arrays that are smaller.
    mean = jnp.sum(cotangent.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
    d_logits = weights * (d_weights - mean) / math.sqrt(query.shape[-1])
    by_query = d_logits.reshape(*weights.shape[:2], -1, *mask.shape[1:])
    by_query = jnp.where(mask[:, None, None], by_query, 0.0)
    d_logits = by_query.reshape(weights.shape).astype(query.dtype)
    d_query = jnp.einsum("BKRS,BKSN->BKRN", d_logits, key_value.key)
    d_key = jnp.einsum("BKRS,BKRN->BKSN", d_logits, query)
    return d_query, KeyValue(d_key, d_value), None


_attend_in_groups.defvjp(_attend_forward, _attend_backward)

"""Packing: short sequences share a row, so that little padding is computed.

A compiled program has one shape, that of M sequences of the greatest length there may be. With K
sizes it holds K versions of the costly part, for 1/K, 2/K, ..., all of the M rows, and takes the
smallest that the sequences fit into. Nothing is compiled anew as lengths change, and results stay
as they are: what is left out is padding, and sequences in one row do not see each other.

Shapes: M sequences, S the width of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Places(NamedTuple):
    """Where each sequence lies."""

    row: Int[Array, "M"]
    start: Int[Array, "M"]
    num_rows: Int[Array, ""]  # that hold any: the first ones


def places(length: Int[Array, "M"], width: int) -> Places:
    """First fit, longest first: each sequence goes to the first row that has room for it.

    It takes at most 11/9 of the fewest rows possible, and one more (Dósa 2007).

    Args:
        length: 1 to `width` each.
    """

    def put(room: Int[Array, "M"], length: Array) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.argmax(room >= length)
        return room.at[row].add(-length), (row, width - room[row])

    order = jnp.argsort(-length)
    room, of_longest_first = jax.lax.scan(put, jnp.full_like(length, width), length[order])
    row, start = (jnp.zeros_like(length).at[order].set(x) for x in of_longest_first)
    return Places(row, start, (room < width).sum())


def sizes(count: int, num_sizes: int) -> tuple[int, ...]:
    """Numbers of rows to compile for, ascending; the last is `count`, one for each sequence."""
    return tuple(sorted({-(-count * k // num_sizes) for k in range(1, num_sizes + 1)}))


def at_size(
    function: Callable[..., Any], needed: Int[Array, ""], sizes: tuple[int, ...], *operands: Any
) -> Any:
    """`function(size, *operands)` at the first of `sizes` that is at least `needed`.

    Its result must have the same shapes for every size.
    """
    if len(sizes) == 1:
        return function(sizes[0], *operands)
    branches = [lambda *operands, size=size: function(size, *operands) for size in sizes]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), needed), branches, *operands)

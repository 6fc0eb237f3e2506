"""Packing: short sequences share a row, so that little padding is computed.

A compiled program has one shape, that of M sequences of the greatest length there may be. With n
sizes it holds n versions of the costly part, for 1/n, 2/n, ..., all of the M rows, and takes the
smallest that the sequences fit into. Nothing is compiled anew as lengths change, and results stay
as they are: what is left out is padding, and sequences in one row do not see each other.

Shapes: M sequences, S the width of a row.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ppo_jax.mesh import pmax_over_shards

Result = TypeVar("Result")


class Places(NamedTuple):
    """Where each sequence lies: in which row, and from where on."""

    row: Int[Array, "M"]
    start: Int[Array, "M"]


class Layout(NamedTuple):
    """So many rows, and where each sequence lies in them."""

    num_rows: int  # fixed when a program is compiled
    places: Places


class Packed(NamedTuple):
    """Sequences as the backbone reads them."""

    tokens: Int[Array, "rows S"]
    mask: Int[Array, "rows S"] | Int[Array, "M"]  # numbers of sequences, or their lengths
    start: Int[Array, "M"]  # of each sequence, in the flattened rows


def in_fewest_rows(
    function: Callable[[Layout | None], Result],
    length: Int[Array, "M"],
    width: int,
    num_sizes: int,
) -> Result:
    """`function(layout)`, with as few of `num_sizes` numbers of rows as will do.

    Args:
        function: its layout is None where each sequence has a row of its own. The results must
            have the same shapes for every number of rows.
        length: 1 to `width` each.
        width: of a row.
    """
    if num_sizes == 1:
        return function(None)
    count = length.shape[0]
    places, needed = first_fit(length, width)
    available = sizes(count, num_sizes)
    layouts = [None if size == count else Layout(size, places) for size in available]
    smallest = jnp.searchsorted(jnp.asarray(available), pmax_over_shards(needed))
    result: Result = jax.lax.switch(smallest, [partial(function, layout) for layout in layouts])
    return result


def sizes(count: int, num_sizes: int) -> tuple[int, ...]:
    """Numbers of rows to compile for, ascending; the last is `count`, one for each sequence."""
    return tuple(sorted({-(-count * k // num_sizes) for k in range(1, num_sizes + 1)}))


def first_fit(length: Int[Array, "M"], width: int) -> tuple[Places, Int[Array, ""]]:
    """Longest first, each sequence goes to the first row that has room for it.

    It takes at most 11/9 of the fewest rows possible, and one more (Dósa 2007).

    Args:
        length: 1 to `width` each.

    Returns:
        the places, and how many rows hold any: the first ones.
    """

    def put(room: Int[Array, "M"], length: Array) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.argmax(room >= length)
        return room.at[row].add(-length), (row, width - room[row])

    order = jnp.argsort(-length)
    room, of_longest_first = jax.lax.scan(put, jnp.full_like(length, width), length[order])
    row, start = (jnp.zeros_like(length).at[order].set(x) for x in of_longest_first)
    return Places(row, start), (room < width).sum()


def pack(tokens: Int[Array, "M S"], length: Int[Array, "M"], layout: Layout | None) -> Packed:
    """The first `length` tokens of each sequence, in the rows that `layout` says.

    Args:
        layout: None leaves each sequence in a row of its own.
    """
    count, width = tokens.shape
    if layout is None:
        return Packed(tokens, length, width * jnp.arange(count))
    num_rows, places = layout
    step = jnp.arange(width)
    is_real = step < length[:, None]
    start = width * places.row + places.start
    size = num_rows * width
    place = jnp.where(is_real, start[:, None] + step, size)  # of padding, beyond the end: dropped
    number = jnp.broadcast_to(1 + jnp.arange(count)[:, None], place.shape)

    def laid_out(x: Int[Array, "M S"]) -> Int[Array, "rows S"]:
        return jnp.zeros(size, x.dtype).at[place].set(x, mode="drop").reshape(num_rows, width)

    return Packed(laid_out(tokens), laid_out(number), start)
